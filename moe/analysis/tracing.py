"""Trace a run: read text, run the model over it, and write down what its routers decide."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe.analysis.trace import About, Batch, Recorder, Writer
from moe.config.model import layer_moe, moe_layers
from moe.config.parse import to_dict
from moe.config.router import facts
from moe.config.run import Config
from moe.data.loader import validation_starts
from moe.data.prepare import prepare
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run import machine, terminal
from moe.run.load import find_checkpoint, load_run

TEXT = "text"  # the domain of a text of one's own


@dataclass(frozen=True)
class What:
    """Which text is traced."""

    text: str = ""  # a file of UTF-8 text, one document; "": the run's validation text
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    batch_size: int = 16  # windows at a time

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.batch_size < 1:
            name = "tokens" if self.tokens < 0 else "batch_size"
            raise BadInput(
                f"{name}={getattr(self, name)} is out of range: accepted is at least {int(self.tokens >= 0)}."
            )

    def key(self) -> str:
        """Another `What` with this key is the same text: of a file its place, size and age count."""
        if not self.text:
            return f"validation text, {self.tokens} tokens"
        try:
            stat = Path(self.text).stat()
        except OSError as error:
            raise BadInput(f"text={self.text} cannot be read ({error.strerror or error}).") from error
        return f"{Path(self.text).resolve()}, {stat.st_size} bytes of {stat.st_mtime_ns}, {self.tokens} tokens"


def trace_run(run: Path, which: str, what: What, folder: Path, trust: bool = False) -> str:
    """Trace the run in `run` at the checkpoint `which` and write the trace to `folder`; what was written, in words.
    Raises `BadInput` for a dense model, a soft router, and what `load_run` and `Writer` refuse."""
    model, tokenizer, run_cfg = load_run(run, which, trust)
    if model.cfg.moe is None:
        raise BadInput(f"run={run} is a dense model: it has no experts to trace.")
    if facts(run_cfg.router).choices == "mixture":
        raise BadInput(f"run={run} has a soft router: every token goes to every expert, and there is nothing to trace.")
    windows = Windows(what, run_cfg, tokenizer)
    about = about_of(run, which, run_cfg, model, tokenizer, windows, what)
    with Writer(folder, about) as writer, Recorder(model, about.k) as recorder:
        for read_BS1, domain_BS, doc_BS, pos_BS in windows:
            tokens_BS, targets_BS = read_BS1[:, :-1], read_BS1[:, 1:]
            columns = recorder.run(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
            writer.add(Batch(tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, *columns))
    return f"{writer.n_tokens:,} tokens in {len(about.layers)} MoE layers, {windows.sampling}"


class Windows:
    """The text that is traced, in windows of S tokens and their targets."""

    def __init__(self, what: What, run_cfg: Config, tokenizer: Tokenizer) -> None:
        self.context, self.batch_size = run_cfg.model.context, what.batch_size
        self.tokens: np.ndarray | None = None
        if what.text:
            self.domains = [TEXT]
            self.tokens = read_text(Path(what.text), tokenizer, self.context)
            count = (len(self.tokens) - 1) // self.context
            self.starts = np.arange(count)[: what.tokens // self.context or None] * self.context
            self.sampling = f"the first {len(self.starts) * self.context} tokens of {Path(what.text).name}"
        else:
            dataset = prepare(run_cfg.data, run_cfg.tokenizer, terminal.say)
            self.domains, self.split = dataset.domains, dataset.split("val")
            self.starts = validation_starts(self.split, self.context, what.tokens or self.split.n_tokens)
            self.sampling = (
                f"{len(self.starts)} windows of {self.context} tokens, spread evenly over the validation text"
            )

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Batches: tokens (n, S + 1), domain, document and position in it (n, S)."""
        for chunk in np.array_split(self.starts, math.ceil(len(self.starts) / self.batch_size)):
            if self.tokens is None:
                read_BS1, domain_BS = self.split.read(chunk, self.context)
                yield read_BS1, domain_BS, *self.split.places(chunk, self.context)
            else:
                place_BS = chunk[:, None] + np.arange(self.context)
                read_BS1 = self.tokens[chunk[:, None] + np.arange(self.context + 1)]
                yield read_BS1, np.zeros_like(place_BS), np.zeros_like(place_BS), place_BS


def read_text(path: Path, tokenizer: Tokenizer, context: int) -> np.ndarray:
    """The token ids of a file. Raises `BadInput` for one that cannot be read, or is too short."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise BadInput(f"text={path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"text={path} is no UTF-8 (byte {error.start}).") from error
    tokens = np.array(tokenizer.encode(text), np.int64)
    if len(tokens) <= context:
        raise BadInput(f"text={path} has {len(tokens)} tokens, and one window takes {context + 1}: give a longer text.")
    return tokens


def about_of(
    run: Path, which: str, cfg: Config, model: Transformer, tokenizer: Tokenizer, windows: Windows, what: What
) -> About:
    """What is traced, for the files' metadata."""
    layers = moe_layers(model.cfg)
    moes = [layer_moe(model.cfg, layer) for layer in layers]
    n_experts = [moe.n_experts + moe.n_cheap for moe in moes]
    fixed_k = all(router.fixed_k for router in model.routers())
    return About(
        run=str(run),
        checkpoint=find_checkpoint(run / "checkpoints", which).name,
        tokenizer=tokenizer.fingerprint,
        vocab_size=model.cfg.vocab_size,
        context=model.cfg.context,
        layers=layers,
        n_experts=n_experts,
        k=max(moe.k for moe in moes) if fixed_k else max(n_experts),
        domains=windows.domains,
        sampling=windows.sampling,
        what=what.key(),
        model=to_dict(model.cfg),
        router=dataclasses.asdict(cfg.router),
        commit=machine.git_state().commit,
    )
