"""Write down which experts every token takes: a trace, in Parquet.

    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/trace                        # its validation text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/mine text=notes.txt          # a text of one's own
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/all tokens=0                 # all of the text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/serve export=true            # and arrays for engines

What is in the folder: moe/analysis/trace.py. `export` also writes routed_experts.npz, the [token, layer, K] array
(int32) that serving engines return, with the token ids, and expert_counts.npy, (layer, expert), which EPLB takes.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import cli
from moe.analysis.trace import About, Batch, Recorder, Trace, Writer
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


@dataclass
class TraceConfig:
    """What to trace, and where to write it."""

    run: str = ""  # a run's folder
    which: str = "best"  # best (lowest validation loss) | last | step-N
    out: str = ""  # the folder to write
    text: str = ""  # a file of UTF-8 text, one document; "": the run's validation text
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    batch_size: int = 16  # windows at a time
    export: bool = False  # also write arrays for serving engines
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        for name in ("run", "out"):
            if not getattr(self, name):
                raise BadInput(f"{name}=... is needed: {'a run to trace' if name == 'run' else 'a folder to write'}.")
        if self.tokens < 0 or self.batch_size < 1:
            name = "tokens" if self.tokens < 0 else "batch_size"
            raise BadInput(
                f"{name}={getattr(self, name)} is out of range: accepted is at least {int(self.tokens >= 0)}."
            )


class Windows:
    """The text that is traced, in windows of S tokens and their targets."""

    def __init__(self, cfg: TraceConfig, run_cfg: Config, tokenizer: Tokenizer) -> None:
        self.context, self.batch_size = run_cfg.model.context, cfg.batch_size
        self.tokens: np.ndarray | None = None
        if cfg.text:
            self.domains = [TEXT]
            self.tokens = read_text(Path(cfg.text), tokenizer, self.context)
            count = (len(self.tokens) - 1) // self.context
            self.starts = np.arange(count)[: cfg.tokens // self.context or None] * self.context
            self.sampling = f"the first {len(self.starts) * self.context} tokens of {Path(cfg.text).name}"
        else:
            dataset = prepare(run_cfg.data, run_cfg.tokenizer, terminal.say)
            self.domains, self.split = dataset.domains, dataset.split("val")
            self.starts = validation_starts(self.split, self.context, cfg.tokens or self.split.n_tokens)
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


@cli.command("trace", TraceConfig, verbatim=("run", "out", "text"))
def main(cfg: TraceConfig) -> None:
    """Trace, and say what was written."""
    run, folder = Path(cfg.run), Path(cfg.out)
    model, tokenizer, run_cfg = load_run(run, cfg.which, cfg.trust)
    if model.cfg.moe is None:
        raise BadInput(f"run={run} is a dense model: it has no experts to trace.")
    if facts(run_cfg.router).choices == "mixture":
        raise BadInput(f"run={run} has a soft router: every token goes to every expert, and there is nothing to trace.")
    windows = Windows(cfg, run_cfg, tokenizer)
    about = about_of(run, cfg.which, run_cfg, model, tokenizer, windows)
    with Writer(folder, about) as writer, Recorder(model, about.k) as recorder:
        for read_BS1, domain_BS, doc_BS, pos_BS in windows:
            tokens_BS, targets_BS = read_BS1[:, :-1], read_BS1[:, 1:]
            columns = recorder.run(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
            writer.add(Batch(tokens_BS, targets_BS, domain_BS, doc_BS, pos_BS, *columns))
    terminal.say(f"trace: {folder}, {writer.n_tokens:,} tokens in {len(about.layers)} MoE layers, {windows.sampling}")
    if cfg.export:
        export(folder)


def about_of(run: Path, which: str, cfg: Config, model: Transformer, tokenizer: Tokenizer, windows: Windows) -> About:
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
        model=to_dict(model.cfg),
        router=dataclasses.asdict(cfg.router),
        commit=machine.git_state().commit,
    )


def export(folder: Path) -> None:
    """Write the arrays that serving engines take beside a trace's files."""
    trace = Trace(folder)
    tokens = trace.table("tokens", ["token"])["token"].to_numpy().astype(np.int32)
    np.savez(folder / "routed_experts.npz", routed_experts=trace.experts().astype(np.int32), input_ids=tokens)
    widest = max(trace.about.n_experts)
    counts = np.stack([np.pad(c.sum(0), (0, widest - c.shape[1])) for c in trace.counts])
    np.save(folder / "expert_counts.npy", counts)
    terminal.say(f"arrays: {folder / 'routed_experts.npz'}, {folder / 'expert_counts.npy'}")


if __name__ == "__main__":
    main()
