"""Loss and bits per byte of a model on any text, in all and by domain, with 95% intervals over documents.

    python -m experiments.evaluate run=runs/demo/moe-seed0                            # its own validation text
    python -m experiments.evaluate run=runs/demo/moe-seed0 which=last                 # the numbers of its summary.json
    python -m experiments.evaluate run=runs/demo/moe-seed0 text=notes.txt             # a text of one's own
    python -m experiments.evaluate run=runs/demo/moe-seed0 data=text data.path=FOLDER # another corpus, tokens=0 for all
    python -m experiments.evaluate hf=FOLDER out=runs/scores.jsonl                    # a model of transformers

Dense models and those with experts; a run's at any checkpoint, in the precision that it was trained in. A corpus is
read by the model's own tokenizer, and its validation text is scored. The text of a model of transformers is that of
`data=`, the blend where none is given. Bits per byte compare models with other tokenizers, the loss does not.

`out` writes the same as JSON lines (`Scored` of moe/eval/scores.py): null is what is unknown, and in `domain` all.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from moe.analysis.tracing import What, windows_of_hf, windows_of_run
from moe.analysis.windows import Windows
from moe.config import data as data_config
from moe.config.data import DataConfig
from moe.convert import hf_weights
from moe.convert.hf_config import read_config
from moe.errors import BadInput
from moe.eval.scores import Interval, Scored, score
from moe.model import dispatch
from moe.run import machine, terminal
from moe.run.jsonl import write_lines
from moe.run.load import find_checkpoint, load_run

HEADINGS = ("text", "loss", "95% interval", "bits per byte", "95% interval", "tokens")
AS_VALIDATED = -1  # `tokens`: as many as the run's own validation had
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
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.hf):
            raise BadInput(f"run=... is needed, or hf=..., one of them{', and both are given' if self.run else ''}.")
        if self.tokens < AS_VALIDATED:
            raise BadInput(f"tokens={self.tokens} is out of range: accepted is at least 0, or -1.")
        data_config.validate(self.data)
        self.what(None, TOKENS, 0)

    def what(self, data: DataConfig | None, n_tokens: int, batch_size: int) -> What:
        """Which text; `n_tokens` and `batch_size` are what is not said."""
        n_tokens = n_tokens if self.tokens == AS_VALIDATED else self.tokens
        return What(self.text, n_tokens, self.batch_size or batch_size, self.context, data)


@cli.command("evaluate", EvaluateConfig, verbatim=("run", "hf", "out", "text"))
def main(cfg: EvaluateConfig) -> None:
    """Score, print a row for all of the text and for each domain, and write the lines."""
    # What cannot be is refused before anything runs.
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"out={cfg.out} exists: choose another, or move it away.")
    data = cfg.data if cli.gives("data") else None
    # Score, and say it.
    source = cfg.run or cfg.hf
    windows, rows = of_run(cfg, data) if cfg.run else of_hf(cfg, data)
    checkpoint = find_checkpoint(Path(cfg.run) / "checkpoints", cfg.which).name if cfg.run else ""
    named = f"{source}, {checkpoint}" if checkpoint else source
    terminal.say(f"{named}: {windows.sampling}; nats per token, intervals over {rows[0].units} {rows[0].unit}")
    tables.print_table(HEADINGS, [cells(row) for row in rows])
    if cfg.out:
        about = {"source": source, "checkpoint": checkpoint, "sampling": windows.sampling}
        write_lines(Path(cfg.out), (about | vars(row) for row in rows))
        terminal.say(f"lines: {cfg.out}")


def of_run(cfg: EvaluateConfig, data: DataConfig | None) -> tuple[Windows, list[Scored]]:
    """The scores of a run, computed as its own validation was, on whatever device is here."""
    model, tokenizer, run_cfg = load_run(Path(cfg.run), cfg.which, cfg.trust)
    device, train = machine.choose_device("auto"), run_cfg.train
    what = cfg.what(data, train.eval_tokens, train.batch_size // train.accumulate)
    windows = windows_of_run(what, run_cfg, tokenizer)
    # Triton need not work here.
    backend = dispatch.choose("auto" if run_cfg.dispatch == "triton" else run_cfg.dispatch, device)[0]
    run_cfg = dataclasses.replace(run_cfg, train=dataclasses.replace(train, device=str(device)))
    autocast = partial(machine.autocast, run_cfg)
    return windows, score(model.to(device), windows, tokenizer, backend=backend, autocast=autocast)


def of_hf(cfg: EvaluateConfig, data: DataConfig | None) -> tuple[Windows, list[Scored]]:
    """The scores of a folder of transformers, in float32."""
    source, device = Path(cfg.hf), machine.choose_device("auto")
    tokenizer, windows = windows_of_hf(cfg.what(data, TOKENS, 0), source, read_config(source)[0])
    backend = dispatch.choose("auto", device)[0]
    return windows, score(hf_weights.load(source).eval().to(device), windows, tokenizer, backend=backend)


def cells(row: Scored) -> tuple[str, ...]:
    """A row of the table."""
    bpb = ("unknown", "") if row.bpb is None else (f"{row.bpb.value:.4f}", interval(row.bpb))
    return row.domain or "all", f"{row.loss.value:.4f}", interval(row.loss), *bpb, f"{row.tokens:,}"


def interval(of: Interval) -> str:
    """From and to, of what is known."""
    return f"{of.low:.4f} to {of.high:.4f}" if of.high < float("inf") else "unknown"


if __name__ == "__main__":
    main()
