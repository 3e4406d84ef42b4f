"""Write down which experts every token takes: a trace, in Parquet.

    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/trace                        # its validation text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/mine text=notes.txt          # a text of one's own
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/all tokens=0                 # all of the text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/serve export=true            # and arrays for engines

What is in the folder: moe/analysis/trace.py. `export` also writes routed_experts.npz, the [token, layer, K] array
(int32) that serving engines return, with the token ids, and expert_counts.npy, (layer, expert), which EPLB takes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import cli
from moe.analysis.trace import Trace
from moe.analysis.tracing import What, trace_run
from moe.errors import BadInput
from moe.run import terminal


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
        _ = self.what

    @property
    def what(self) -> What:
        """Which text."""
        return What(self.text, self.tokens, self.batch_size)


@cli.command("trace", TraceConfig, verbatim=("run", "out", "text"))
def main(cfg: TraceConfig) -> None:
    """Trace, and say what was written."""
    said = trace_run(Path(cfg.run), cfg.which, cfg.what, Path(cfg.out), cfg.trust)
    terminal.say(f"trace: {cfg.out}, {said}")
    if cfg.export:
        export(Path(cfg.out))


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
