"""Write down which experts every token takes: a trace, in Parquet.

    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/trace                        # its validation text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/mine text=notes.txt          # a text of one's own
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/all tokens=0                 # all of the text
    python -m experiments.trace run=runs/demo/moe-seed0 out=runs/serve export=true            # and arrays for engines
    python -m experiments.trace hf=FOLDER out=runs/theirs                                     # a model of transformers
    python -m experiments.trace hf=FOLDER out=runs/large stream=true                          # one layer at a time
    python -m experiments.trace records=FILE format=sglang out=runs/served                    # what an engine recorded

What is in the folder: moe/analysis/trace.py. `export` also writes routed_experts.npz, the [token, layer, K] array
(int32) that serving engines return, with the token ids, and expert_counts.npy, (layer, expert), which EPLB takes.

The text of a model of transformers is the validation text of `data=`, by the folder's own tokenizer. A folder without
one that can be read takes token ids: `text=IDS.npy`. With `stream=true` a model may be far larger than memory: what
that takes says `python -m experiments.plan trace=...`. Formats of records: moe/analysis/records.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments import cli
from moe.analysis import records
from moe.analysis.trace import Trace
from moe.analysis.tracing import What, trace_hf, trace_run
from moe.config import data as data_config
from moe.config.data import DataConfig
from moe.config.parse import OneOf
from moe.errors import BadInput
from moe.run import terminal

SOURCES = ("run", "hf", "records")


@dataclass
class TraceConfig:
    """What to trace, and where to write it."""

    run: str = ""  # a run's folder
    which: str = "best"  # run: best (lowest validation loss) | last | step-N
    hf: str = ""  # instead of a run: a folder of transformers, of any family with experts that convert reads
    stream: bool = False  # hf: one layer in memory at a time
    records: str = ""  # instead of a run: a file that a serving engine or Megatron recorded
    format: str = ""  # records: sglang | vllm | megatron
    n_experts: int = 0  # records: of a layer; 0: as many as the largest number in the file tells
    out: str = ""  # the folder to write
    text: str = ""  # a file of UTF-8 text, one document, or of token ids (.npy); "": the validation text of `data`
    data: DataConfig = field(default_factory=DataConfig)  # a corpus; not given: the run's own, or the blend
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    context: int = 0  # tokens of a window; 0: the model's own, of one of transformers at most 512
    batch_size: int = 0  # windows at a time; 0: as many as have 1,024 tokens
    export: bool = False  # also write arrays for serving engines
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            tail = "" if not given else f", and {' and '.join(given)} are given"
            raise BadInput(f"run=... is needed, or hf=... or records=..., one of them: what to trace{tail}.")
        if not self.out:
            raise BadInput("out=... is needed: a folder to write.")
        if bool(self.records) != bool(self.format):
            raise BadInput("records=FILE and format=sglang, vllm or megatron go together.")
        if self.format:
            OneOf(*records.READERS).check("format", self.format)
        if self.stream and not self.hf:
            raise BadInput("stream=true is of hf=...: a run is loaded whole.")
        if self.n_experts < 0:
            raise BadInput(f"n_experts={self.n_experts} is out of range: accepted is at least 0.")
        data_config.validate(self.data)
        What(self.text, self.tokens, self.batch_size, self.context)


@cli.command("trace", TraceConfig, verbatim=(*SOURCES, "out", "text"))
def main(cfg: TraceConfig) -> None:
    """Trace, and say what was written."""
    folder = Path(cfg.out)
    what = What(cfg.text, cfg.tokens, cfg.batch_size, cfg.context, cfg.data if cli.gives("data") else None)
    if cfg.records:
        writer = records.write_trace(Path(cfg.records), cfg.format, folder, cfg.n_experts)
    elif cfg.run:
        writer = trace_run(Path(cfg.run), cfg.which, what, folder, cfg.trust)
    else:
        writer = trace_hf(Path(cfg.hf), what, folder, cfg.stream)
    n_layers, sampling = len(writer.about.layers), writer.about.sampling
    terminal.say(f"trace: {folder}, {writer.n_tokens:,} tokens in {n_layers} MoE layers, {sampling}")
    if cfg.export:
        export(folder)


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
