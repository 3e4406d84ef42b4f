"""Loss and bits per byte of a model on any text, with 95% intervals over documents, and its scores in tasks.

    python -m experiments.evaluate run=runs/demo/moe-seed0                            # its own validation text
    python -m experiments.evaluate run=runs/demo/moe-seed0 which=last                 # the numbers of its summary.json
    python -m experiments.evaluate run=runs/demo/moe-seed0 text=notes.txt             # a text of one's own
    python -m experiments.evaluate run=runs/demo/moe-seed0 data=text data.path=FOLDER # another corpus, tokens=0 for all
    python -m experiments.evaluate hf=FOLDER out=runs/scores.jsonl                    # a model of transformers
    python -m experiments.evaluate run=runs/demo/moe-seed0 tasks=arithmetic,heldout   # tasks instead of a text
    python -m experiments.evaluate run=runs/demo/moe-seed0 tasks=brackets fewshot=4 limit=100
    python -m experiments.evaluate run=runs/demo/moe-seed0 experts=int8               # its experts in 8 bits a weight

Dense models and those with experts; a run's at any checkpoint, in the precision that it was trained in. A corpus is
read by the model's own tokenizer, and its validation text is scored. The text of a model of transformers is that of
`data=`, the blend where none is given. Bits per byte compare models with other tokenizers, the loss does not.

`tasks` asks questions instead, by lm-eval (pip install 'moe-switchyard[tasks]'). No network is needed for arithmetic,
copy, induction, brackets, cloze, latent and heldout (bits per byte of documents of `data=`, or of `text=`); all other
names are of the harness, which fetches their questions.

With `experts` the matrices of a run's routed experts are stored in that format, each rounded as it is read, and nothing
else is (moe/model/quantized.py); the activations keep the precision of the run.

`out` writes the same as JSON lines (`Scored` of moe/eval/scores.py, `TaskScore` of moe/eval/tasks.py; `experts` is
`Storage` of moe/model/quantized.py): null is what is unknown, in `domain` all, and in `experts` as they were trained.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments import cli
from experiments.pages import tables
from moe.analysis.tracing import What, check_context, tokenizer_of, windows_of_hf, windows_of_run
from moe.analysis.windows import AT_ONCE, LONGEST, Windows, read_text
from moe.config import data as data_config
from moe.config.data import DataConfig
from moe.config.parse import OneOf
from moe.convert import hf_weights
from moe.convert.hf_config import read_config
from moe.convert.hf_tokenizer import text_start
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.scores import Interval, Scored, score
from moe.eval.tasks import TaskScore
from moe.model import dispatch, quantized
from moe.model.transformer import Transformer
from moe.run import machine, terminal
from moe.run.jsonl import write_lines
from moe.run.load import find_checkpoint, load_run

HEADINGS = ("text", "loss", "95% interval", "bits per byte", "95% interval", "tokens")
AS_VALIDATED = -1  # `tokens`: as many as the run's own validation had
AS_THE_TASK_SAYS = -1  # `fewshot`
TASK_HEADINGS = ("task", "metric", "value", "stderr", "95% interval", "n", "chance")
TOKENS = 100_000  # of a model of transformers, if it is not said


@dataclass
class EvaluateConfig:
    """Which model, and on which text."""

    run: str = ""  # a run's folder
    which: str = "best"  # run: best (lowest validation loss) | last | step-N
    hf: str = ""  # instead of a run: a folder of transformers, of any family that convert reads
    text: str = ""  # a file of UTF-8 text, one document, or of token ids (.npy); "": the validation text of `data`
    data: DataConfig = field(default_factory=DataConfig)  # a corpus; not given: the run's own, or the blend
    tokens: int = AS_VALIDATED  # at most so many, spread evenly; 0: all; -1: as the run's validation, of hf 100,000
    context: int = 0  # tokens of a window; 0: the model's own, of one of transformers at most 512
    batch_size: int = 0  # windows at a time; 0: the run's, of hf as many as have 1,024 tokens
    out: str = ""  # a file to write, in JSON lines; "": none
    tasks: str = ""  # instead of a text: tasks of lm-evaluation-harness, with commas between their names
    limit: int = 0  # tasks: the first so many questions of each; 0: all
    fewshot: int = -1  # tasks: examples before each question; -1: as many as the task says
    experts: str = ""  # of a run: routed experts as int8, fp8 or mxfp4 of kernels/quantized.py; "": as they are
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.hf):
            raise BadInput(f"run=... is needed, or hf=..., one of them{', and both are given' if self.run else ''}.")
        if self.experts:
            OneOf(*quantized.FORMATS).check("experts", self.experts)
            if self.hf:
                raise BadInput(
                    f"experts={self.experts} is for run=...: make a run of hf={self.hf} first, with "
                    f"python -m experiments.convert source={self.hf} to=runs/NAME."
                )
        if self.tokens < AS_VALIDATED:
            raise BadInput(f"tokens={self.tokens} is out of range: accepted is at least 0, or -1.")
        if self.limit < 0:
            raise BadInput(f"limit={self.limit} is out of range: accepted is at least 0.")
        if self.fewshot < AS_THE_TASK_SAYS:
            raise BadInput(f"fewshot={self.fewshot} is out of range: accepted is at least 0, or -1.")
        if not self.tasks and (self.limit or self.fewshot != AS_THE_TASK_SAYS):
            key = f"limit={self.limit}" if self.limit else f"fewshot={self.fewshot}"
            raise BadInput(f"{key} means nothing without tasks=..., the names of tasks.")
        if self.tasks and self.text.endswith(".npy"):
            raise BadInput(f"text={self.text} holds token ids, and tasks={self.tasks} are text: give a file of text.")
        if self.text or self.tokens != AS_VALIDATED:
            self.check_held_out(f"text={self.text}" if self.text else f"tokens={self.tokens}")
        data_config.validate(self.data)
        self.what(None, TOKENS, 0)

    def check_held_out(self, key: str) -> None:
        """Raise `BadInput` for a setting that says which text, where no task is asked that has one."""
        if self.tasks and "heldout" not in self.names():
            raise BadInput(f"{key} means nothing to tasks={self.tasks}: it says which text heldout is of.")

    def names(self) -> list[str]:
        """Of the tasks."""
        return [name.strip() for name in self.tasks.split(",")]

    def what(self, data: DataConfig | None, n_tokens: int, batch_size: int) -> What:
        """Which text; `n_tokens` and `batch_size` are what is not said."""
        n_tokens = n_tokens if self.tokens == AS_VALIDATED else self.tokens
        return What(self.text, n_tokens, self.batch_size or batch_size, self.context, data)


class Subject(NamedTuple):
    """What is evaluated, on whatever device is here: a tokenizer, the text that is asked for, and the model, each made
    when it is needed."""

    tokenizer: Tokenizer | None
    windows: Callable[[], Windows]
    load: Callable[[], Transformer]
    context: int  # tokens that are read together
    batch_size: int  # texts that are
    backend: str
    autocast: Callable[[], AbstractContextManager[Any]]
    stored: quantized.Storage | None = None  # what its experts take, where they are not stored as they were trained
    start: tuple[list[int], int] | None = None  # how a text begins, as in `Asked` of moe/eval/harness.py


@cli.command("evaluate", EvaluateConfig, verbatim=("run", "hf", "out", "text", "tasks"))
def main(cfg: EvaluateConfig) -> None:
    """Score the text, print a row for all of it and for each domain, or for each metric of the tasks; and write the
    lines."""
    # What cannot be is refused before anything runs.
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"out={cfg.out} exists: choose another, or move it away.")
    data = cfg.data if cli.gives("data") else None
    if data:
        cfg.check_held_out("data=...")
    # Score, and say it.
    subject = of_run(cfg, data) if cfg.run else of_hf(cfg, data)
    source = cfg.run or cfg.hf
    checkpoint = find_checkpoint(Path(cfg.run) / "checkpoints", cfg.which).name if cfg.run else ""
    named = f"{source}, {checkpoint}" if checkpoint else source
    about = {"source": source, "checkpoint": checkpoint, "experts": subject.stored and subject.stored._asdict()}
    if subject.stored:
        terminal.say(str(subject.stored))
    rows = of_tasks(cfg, subject, named) if cfg.tasks else of_text(subject, named)
    if cfg.out:
        write_lines(Path(cfg.out), (about | row for row in rows))
        terminal.say(f"lines: {cfg.out}")


def of_text(subject: Subject, named: str) -> list[dict[str, Any]]:
    """The scores of the text, printed and as lines."""
    windows = subject.windows()
    settings = {"backend": subject.backend, "autocast": subject.autocast}
    rows = score(subject.load(), windows, subject.tokenizer, **settings)  # type: ignore[arg-type]
    terminal.say(f"{named}: {windows.sampling}; nats per token, intervals over {rows[0].units} {rows[0].unit}")
    tables.print_table(HEADINGS, [cells(row) for row in rows])
    return [{"sampling": windows.sampling} | vars(row) for row in rows]


def of_tasks(cfg: EvaluateConfig, subject: Subject, named: str) -> list[dict[str, Any]]:
    """The scores of the tasks, printed and as lines. Raises `BadInput` where lm-eval is not installed."""
    try:
        from moe.eval import harness
    except ImportError as error:
        raise BadInput(
            f"tasks={cfg.tasks} needs the package lm-eval, which cannot be imported ({error}): "
            "pip install 'moe-switchyard[tasks]'."
        ) from error
    assert subject.tokenizer, "a task is text"
    asked = harness.Asked(
        subject.load(),
        subject.tokenizer,
        context=subject.context,
        batch_size=subject.batch_size,
        backend=subject.backend,
        autocast=subject.autocast,
        start=subject.start,
    )
    fewshot = None if cfg.fewshot == AS_THE_TASK_SAYS else cfg.fewshot
    rows = harness.ask(asked, cfg.names(), limit=cfg.limit, fewshot=fewshot, held_out=lambda: held_out(cfg, subject))
    before = "".join(f", {subject.tokenizer.decode([token])} before every text" for token in asked.before)
    terminal.say(f"{named}: tasks of lm-evaluation-harness, {subject.context} tokens of context{before}")
    tables.print_table(TASK_HEADINGS, [task_cells(row) for row in rows], left=2)
    return [vars(row) for row in rows]


def held_out(cfg: EvaluateConfig, subject: Subject) -> list[str]:
    """Documents to ask for the probability of: the one text, or so many of the validation text, spread evenly over it,
    as have about the tokens that are asked for."""
    assert subject.tokenizer, "a task is text"
    if cfg.text:
        ids = subject.tokenizer.encode(read_text(Path(cfg.text)))
        return [subject.tokenizer.decode(ids[: cfg.tokens] if cfg.tokens > 0 else ids)]
    windows = subject.windows()
    assert windows.corpus, "not one text"
    split = windows.corpus.split("val")
    every = max(1, split.n_tokens // (len(windows.starts) * windows.context))
    return [subject.tokenizer.decode(ids.tolist()) for ids in split.documents(every)]


def of_run(cfg: EvaluateConfig, data: DataConfig | None) -> Subject:
    """A run, computed as its own validation was."""
    model, tokenizer, run_cfg = load_run(Path(cfg.run), cfg.which, cfg.trust, cfg.experts)
    device, train = machine.choose_device("auto"), run_cfg.train
    what = cfg.what(data, train.eval_tokens, train.batch_size // train.accumulate)
    # Triton need not work here.
    backend = dispatch.choose("auto" if run_cfg.dispatch == "triton" else run_cfg.dispatch, device)[0]
    placed = dataclasses.replace(run_cfg, train=dataclasses.replace(train, device=str(device)))
    context = cfg.context or model.cfg.context
    check_context(context, model.cfg)
    return Subject(
        tokenizer,
        lambda: windows_of_run(what, run_cfg, tokenizer),
        lambda: model.to(device),
        context,
        what.batch_size,
        backend,
        partial(machine.autocast, placed),
        quantized.storage(model),
    )


def of_hf(cfg: EvaluateConfig, data: DataConfig | None) -> Subject:
    """A folder of transformers, in float32."""
    source, device = Path(cfg.hf), machine.choose_device("auto")
    what, settings = cfg.what(data, TOKENS, 0), read_config(source)[0]
    context = cfg.context or min(settings.context, LONGEST)
    check_context(context, settings)
    tokenizer = tokenizer_of(what, source, settings.vocab_size)
    return Subject(
        tokenizer,
        lambda: windows_of_hf(what, tokenizer, settings),
        lambda: hf_weights.load(source).eval().to(device),
        context,
        what.batch_size or max(1, AT_ONCE // context),
        dispatch.choose("auto", device)[0],
        nullcontext,
        start=text_start(source, tokenizer) if tokenizer else None,
    )


def cells(row: Scored) -> tuple[str, ...]:
    """A row of the table."""
    bpb = ("unknown", "") if row.bpb is None else (f"{row.bpb.value:.4f}", interval(row.bpb))
    return row.domain or "all", f"{row.loss.value:.4f}", interval(row.loss), *bpb, f"{row.tokens:,}"


def task_cells(row: TaskScore) -> tuple[str, ...]:
    """A row of the table of tasks."""
    stderr, chance = (f"{value:.4f}" if value is not None else "" for value in (row.stderr, row.chance))
    return row.task, row.metric, f"{row.score.value:.4f}", stderr, interval(row.score), f"{row.n:,}", chance


def interval(of: Interval) -> str:
    """From and to, of what is known."""
    return f"{of.low:.4f} to {of.high:.4f}" if of.high < float("inf") else "unknown"


if __name__ == "__main__":
    main()
