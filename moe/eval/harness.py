"""Tasks of lm-evaluation-harness (Biderman et al., 2405.14782), asked of a model of this project.

The harness turns a task's questions into requests of three kinds, which `Asked` answers: how probable is a
continuation, how probable is a whole text, and what does the model say. It also scores the answers. Its tasks are known
by name and fetch their questions; those of `tasks.py`, and `heldout`, need no network.

This is the one file that imports lm_eval, an extra: pip install 'moe-switchyard[tasks]'.
"""

import contextlib
import functools
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe.analysis.effects import ratios
from moe.config.parse import nearest
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval import tasks
from moe.eval.evaluate import eval_mode
from moe.eval.generate import check_causal, sample, token_bytes
from moe.eval.scores import Interval
from moe.eval.tasks import TaskScore
from moe.model.transformer import Transformer
from moe.run import terminal

HELD_OUT = "heldout"  # bits per byte of documents that are given
HERE = (*tasks.TASKS, HELD_OUT)  # tasks that need no network
SAID = 256  # tokens that a task may be answered with, if it says nothing, and half a context at most
RESAMPLES = 1000  # of the harness, for metrics that are no means
NORMAL = 1.959964  # standard errors on either side that make a 95% interval
SEED = 1234  # of which examples are shown: the harness' own

known_tasks = functools.cache(lambda stock: TaskManager(include_defaults=stock))  # it takes seconds to list its own
Request = tuple[Any, list[int], list[int]]  # what it is called, context and continuation
Autocast = Callable[[], AbstractContextManager[Any]]


class Manner(NamedTuple):
    """How a text is to be continued."""

    max_new: int
    until: tuple[str, ...]
    temperature: float
    top_k: int
    top_p: float


class Asked(TemplateLM):
    """A model that the harness asks.

    What does not fit the context is cut from the left, which is said once."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        backend: str = "torch",
        autocast: Autocast = nullcontext,
        start: tuple[list[int], int] | None = None,
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        """`context`: at most so many tokens are read. `start`: the ids before every text, and the one that an empty
        text consists of; None: none and the end-of-text token, after which a document begins in training. Raises
        `BadInput` for a model whose experts choose among all tokens: it would read the answer with the question."""
        super().__init__()
        check_causal(model)
        self.model, self.text, self.say, self.said = model, tokenizer, say, False
        self.before, self.empty = start or ([], tokenizer.eot)
        self.context, self.batch_size, self.backend_name, self.autocast = context, batch_size, backend, autocast

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.text.eot

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        return self.empty

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, and before them those that stand before every one, unless they are not to be added."""
        return [*([] if add_special_tokens is False else self.before), *self.text.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. White space at the end of the context belongs to the continuation. Where a token of the two
        together would span where they meet, each is encoded by itself: the continuation has all of its text."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        context_ids, whole_ids = self.tok_encode(kept), self.tok_encode(kept + continuation)
        if whole_ids[: len(context_ids)] == context_ids:
            return context_ids or [self.empty], whole_ids[len(context_ids) :]
        return context_ids, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is what greedy decoding says) of every continuation. Raises `BadInput`
        for one that is longer than the context, and for logits that are not finite."""
        longest = max((len(request[2]) for request in requests), default=0)
        if longest > self.context:
            raise BadInput(
                f"a continuation of {longest} tokens is longer than the {self.context} that the model reads: choose "
                "another task, or a larger context=..., if the model has it."
            )
        answers: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for chunk in self.batches(order):
            # The last token is predicted and not read.
            texts = [self.fit(requests[i][1] + requests[i][2], self.context + 1)[:-1] for i in chunk]
            logits_BSV = self.logits(texts)
            for i, text, logits_SV in zip(chunk, texts, logits_BSV, strict=True):
                target_S = torch.tensor(requests[i][2], device=logits_SV.device)
                logits_SV = logits_SV[len(text) - len(target_S) : len(text)]
                logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
                nats = logits_SV.log_softmax(-1).gather(-1, target_S[:, None]).sum().item()
                if not math.isfinite(nats):
                    raise BadInput(f"the model gives a text the log-probability {nats}: choose another checkpoint.")
                answers[i] = nats, bool((logits_SV.argmax(-1) == target_S).all())
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every text, in nats: its first token after an empty text's, and of one that is longer
        than the context window after window, each after the last token of the one before, and the last with as much
        before it as fits."""
        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.empty, self.context, 1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        nats = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(nats)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after every prompt, up to the end-of-text token or a string that ends the answer. Prompts
        of one length are continued together: nothing is padded."""
        alike: dict[tuple[Manner, int], list[tuple[int, list[int]]]] = {}
        for i, request in enumerate(requests):
            manner = self.manner(request.args[1])
            ids = self.fit(self.tok_encode(request.args[0]) or [self.empty], self.context - manner.max_new)
            alike.setdefault((manner, len(ids)), []).append((i, ids))
        answers: dict[int, str] = {}
        for (manner, _), prompts in alike.items():
            for chunk in self.batches(prompts):
                answers |= zip((i for i, _ in chunk), self.answer([ids for _, ids in chunk], manner), strict=True)
        return [answers[i] for i in range(len(requests))]

    def manner(self, wanted: dict[str, Any]) -> Manner:
        """What a task's `generation_kwargs` say. Raises `BadInput` for what is not done here, or does not fit."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(wanted, min(SAID, self.context // 2)))
        until, max_new = tuple(filter(None, settings.pop("until"))), settings.pop("max_gen_toks")
        drawn = settings.pop("do_sample")
        temperature = settings.pop("temperature", 1.0) if drawn else 0.0
        top_k, top_p = settings.pop("top_k", 0), settings.pop("top_p", 1.0)
        others = [key for key, value in settings.items() if (key, value) not in (("num_beams", 1), ("temperature", 0))]
        if others:
            raise BadInput(
                f"a task wants {others[0]}={settings[others[0]]} of generation: accepted are until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p."
            )
        if max_new >= self.context:
            raise BadInput(
                f"a task wants answers of {max_new} tokens, and the model reads {self.context} with the question: "
                "choose another task, or a larger context=..., if the model has it."
            )
        return Manner(max_new, until, temperature, top_k or 0, top_p)

    def answer(self, prompts: list[list[int]], manner: Manner) -> list[str]:
        """What the model says after prompts of one length."""
        said, ended = [b""] * len(prompts), [False] * len(prompts)
        cut = lambda raw: _before(raw.decode(errors="replace"), manner.until)
        with eval_mode(self.model), self.autocast():
            for token_B in sample(
                self.model,
                prompts,
                manner.max_new,
                temperature=manner.temperature,
                top_k=manner.top_k,
                top_p=manner.top_p,
                backend=self.backend_name,
            ):
                for row, token in enumerate(token_B.tolist()):
                    if token == self.eot_token_id:
                        ended[row] = True
                    elif not ended[row]:
                        said[row] += token_bytes(self.text, token)
                        ended[row] = cut(said[row]) != said[row].decode(errors="replace")
                if all(ended):
                    break
        return [cut(raw) for raw in said]

    @torch.inference_mode()
    def logits(self, texts: list[list[int]]) -> torch.Tensor:
        """Logits (B, S, V) of texts, padded behind their ends, which the model cannot see from before."""
        longest = max(map(len, texts))
        tokens_BS = torch.tensor([text + [self.eot_token_id] * (longest - len(text)) for text in texts])
        with eval_mode(self.model), self.autocast():
            return self.model(tokens_BS.to(self.model.embed.weight.device), backend=self.backend_name).logits_BSV

    def fit(self, ids: list[int], room: int) -> list[int]:
        """The last `room` of the ids."""
        if len(ids) > room and not self.said:
            self.say(f"note: what is longer than the context of {self.context} tokens is cut from the left.")
            self.said = True
        return ids[-room:]

    def batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """So many at a time as the model is asked together; a terminal is shown how far it is."""
        starts = tqdm(range(0, len(items), self.batch_size), "batches", leave=False, disable=None)
        return (items[start : start + self.batch_size] for start in starts)


def _before(text: str, until: tuple[str, ...]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min((text.find(end) for end in until if end in text), default=len(text))]


def ask(
    asked: Asked,
    names: Sequence[str],
    *,
    limit: int = 0,
    fewshot: int | None = None,
    held_out: Callable[[], list[str]] = list,
) -> list[TaskScore]:
    """Ask the questions of tasks, the first `limit` of each (0: all), after `fewshot` examples (None: as many as the
    task says); `held_out` gives the texts of `heldout`. Raises `BadInput` for a task that is not known or cannot be
    had, and what `Asked` refuses."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    # The harness reports progress and warns at length: a terminal gets the former, nobody the latter.
    with nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        logger.setLevel(logging.ERROR)
        try:
            loaded = load(names, fewshot, held_out)
            results = evaluator.evaluate(asked, loaded, limit=limit or None, bootstrap_iters=RESAMPLES)
        finally:
            logger.setLevel(level)
    assert results is not None, "the only process is the first"
    rows = []
    for name, measured in results["results"].items():
        questions = results["samples"].get(name, [])
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = measured.get(f"{metric}_stderr,{kind}")
                stderr = float(stderr) if isinstance(stderr, int | float) else None
                rows.append(scored(name, metric, kind, float(value), stderr, questions, results["n-shot"].get(name, 0)))
    return rows


def scored(
    task: str, metric: str, kind: str, value: float, stderr: float | None, questions: list[dict[str, Any]], fewshot: int
) -> TaskScore:
    """A row: what the harness says of one metric, with its interval and what chance gives."""
    questions = [question for question in questions if question["filter"] == kind]
    spread = NORMAL * stderr if stderr else math.inf  # where all answers are alike it is 0, which says nothing
    score = Interval(value, value - spread, value + spread)
    # It has no standard error of a ratio.
    if metric == "bits_per_byte" and questions:
        nats_U, bytes_U = np.array([question[metric] for question in questions], float).T
        _, (low,), (high,) = ratios(-nats_U[None] / math.log(2), bytes_U)
        score = Interval(value, float(low), float(high))
    # A question with choices has a request for each.
    choices = [len(question["arguments"]) for question in questions] if metric in ("acc", "acc_norm") else []
    chance = float(np.mean([1 / n for n in choices])) if choices and min(choices) > 1 else None
    named = metric if kind == "none" else f"{metric} ({kind})"
    return TaskScore(task, named, score, stderr, len(questions), fewshot, chance)


def load(names: Sequence[str], fewshot: int | None, held_out: Callable[[], list[str]]) -> Any:
    """The tasks, as `lm_eval.evaluator.evaluate` takes them. Raises `BadInput`."""
    others = [name for name in names if name not in HERE]
    if fewshot is not None and fewshot > tasks.SHOTS and len(others) < len(names):
        raise BadInput(
            f"fewshot={fewshot} is out of range: {', '.join(HERE[:-1])} have {tasks.SHOTS} examples to show."
        )
    manager = known_tasks(bool(others))
    for name in others:
        if name not in manager.all_tasks:
            raise BadInput(
                f"tasks has {name!r}, which is none of {', '.join(HERE)}, nor a task of lm-evaluation-harness: "
                f"{nearest(name, [*HERE, *manager.all_tasks]) if name else 'give a name'}."
            )
    built: list[Any] = []
    for name in names:
        if name in HERE:
            config = of_documents(held_out()) if name == HELD_OUT else of_questions(name)
            built.append(ConfigurableTask(config=config))
            continue
        try:
            built += manager.load([name])["tasks"].values()
        except Exception as error:  # those of every library that questions are fetched and read with
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BadInput(
                f"the questions of the task {name} cannot be had ({reason}): without a network there are "
                f"{', '.join(HERE)}."
            ) from error
    loaded = manager.load(built)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default != 0:  # which a task says if it takes none
            task.set_config(key="num_fewshot", value=(default or 0) if fewshot is None else fewshot)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def of_questions(name: str) -> dict[str, Any]:
    """The harness' settings of a task of tasks.py."""
    shown, questions = (datasets.Dataset.from_list(rows) for rows in tasks.documents(name))
    common = {
        "task": name,
        "custom_dataset": lambda **_: {"shown": shown, "asked": questions},
        "training_split": "shown",
        "fewshot_split": "shown",
        "test_split": "asked",
        "doc_to_text": "text",
        "target_delimiter": tasks.TASKS[name].between,
        "metadata": {"version": 1},
    }
    # An answer is said, and compared; of choices the most probable one is taken.
    mean = {"aggregation": "mean", "higher_is_better": True}
    if "answer" in questions.features:
        return common | {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24},
            "filter_list": [
                {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match", **mean}],
        }
    # Of choices exact_match is whether greedy decoding would say the right one.
    metrics = ("acc", "exact_match") if name == "arithmetic" else ("acc",)
    return common | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": metric, **mean} for metric in metrics],
    }


def of_documents(texts: list[str]) -> dict[str, Any]:
    """The harness' settings of `heldout`. Raises `BadInput` where there is no text."""
    if not any(texts):
        raise BadInput(f"{HELD_OUT} has no text: give one with text=..., or a corpus with data=...")
    documents = datasets.Dataset.from_list([{"text": text} for text in texts if text])
    return {
        "task": HELD_OUT,
        "custom_dataset": lambda **_: {"asked": documents},
        "test_split": "asked",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        "metadata": {"version": 1},
    }
