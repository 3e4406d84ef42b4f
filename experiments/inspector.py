"""See what each expert does: a summary on the terminal, and one page that opens from disk.

    python -m experiments.inspector run=runs/demo/moe-seed0
    python -m experiments.inspector run=runs/demo/moe-seed0 beside=[runs/demo/moe-seed1]      # two, side by side
    python -m experiments.inspector hf=FOLDER out=runs/theirs                                 # a model of transformers
    python -m experiments.inspector trace=runs/demo-trace out=runs/demo-page                  # of a trace that is there

Writes index.html, and the trace that it shows, into `out` (by default the run's folder inspector/). Nothing is loaded
from the network.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import inspector_page, tables
from experiments.pages.inspector_tables import Look, layer_table
from moe.analysis.evidence import weigh
from moe.analysis.findings import findings, verdict
from moe.analysis.history import read_history
from moe.analysis.inspection import inspect
from moe.analysis.probing import Probed, probe
from moe.analysis.trace import FILES, Trace
from moe.analysis.tracing import What, trace_hf, trace_run, weights_in
from moe.config import data as data_config
from moe.config.data import DataConfig
from moe.convert.hf_tokenizer import read_tokenizer
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.run import terminal
from moe.run.jsonl import write_atomically
from moe.run.load import find_checkpoint

SOURCES = ("run", "hf", "trace")
MOST = 200_000  # tokens that a page is of
PROBED, FEW = 8192, 64  # tokens on which experts are masked, where there are at most so many


@dataclass
class InspectorConfig:
    """What to look at."""

    run: str = ""  # a run's folder
    beside: list[str] = field(default_factory=list)  # other runs, on the same page
    hf: str = ""  # a folder of transformers, instead of a run
    stream: bool = False  # hf: one layer in memory at a time
    trace: str = ""  # a trace that is there, instead of a run
    which: str = "best"  # best (lowest validation loss) | last | step-N
    out: str = ""  # the folder to write; "": inspector/ in the run's folder
    text: str = ""  # a file of UTF-8 text to trace; "": the validation text of `data`
    data: DataConfig = field(default_factory=DataConfig)  # a corpus; not given: the run's own, or the blend
    tokens: int = 100_000  # at most so many are traced
    # on so many tokens every expert is masked in turn, which takes a pass each; 0: not at all, -1: 8192 where the model
    # has at most 64 experts, else not at all
    probe: int = -1
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            tail = f", and {' and '.join(given)} are given" if given else ""
            raise BadInput(f"run=..., hf=... or trace=... is needed, one of them: what to look at{tail}.")
        if not self.run and not self.out:
            raise BadInput(f"out=... is needed with {given[0]}=...: the folder to write the page to.")
        if self.stream and not self.hf:
            raise BadInput("stream=true is of hf=...: a run is loaded whole.")
        if self.probe < -1:
            raise BadInput(f"probe={self.probe} is out of range: accepted is at least 0, or -1.")
        if self.beside and not self.run:
            raise BadInput("beside=... goes with run=...: a trace, or a model of transformers, is shown alone.")
        data_config.validate(self.data)
        What(self.text, self.tokens)


@cli.command("inspector", InspectorConfig, verbatim=(*SOURCES, "out", "text"))
def main(cfg: InspectorConfig) -> None:
    """Trace what is not traced yet, say what was seen, and write the page."""
    out = Path(cfg.out or f"{cfg.run}/inspector")
    what = What(cfg.text, cfg.tokens, data=cfg.data if cli.gives("data") else None)
    if cfg.trace:
        looks = [look_at(Trace(Path(cfg.trace)), what, cfg)]
    elif cfg.hf:
        looks = [look_at(traced(Path(cfg.hf), out / "trace", what, cfg), what, cfg)]
    else:
        runs = [Path(run) for run in (cfg.run, *cfg.beside)]
        names = [f"trace-{i}" if i else "trace" for i in range(len(runs))]
        looks = [look_at(traced(run, out / name, what, cfg), what, cfg) for run, name in zip(runs, names, strict=True)]
    for look in looks:
        say(look)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "index.html", inspector_page.render(looks))
    except OSError as error:
        raise BadInput(f"out={out} cannot be written ({error.strerror or error}).") from error
    terminal.say(f"page: {out / 'index.html'}")


def traced(run: Path, folder: Path, what: What, cfg: InspectorConfig) -> Trace:
    """The trace in `folder` of a run, or of a folder of transformers: the one that is there, where it is of the same
    weights and the same text; else a new one in its place. Raises `BadInput` where something else is there."""
    weights = weights_in(run if cfg.hf else find_checkpoint(run / "checkpoints", cfg.which))
    if folder.exists():
        others = {path.name for path in folder.iterdir()} - {f"{name}.parquet" for name in FILES}
        if others:
            raise BadInput(f"{folder} has other files than a trace's, like {min(others)}: give another out=.")
        try:
            about = Trace(folder).about
            fits = about.run == str(run) and about.weights == weights and about.what == what.key()
        except BadInput:
            fits = False
        if fits:
            return Trace(folder)
        shutil.rmtree(folder)
    streamed = lambda: trace_hf(run, what, folder, cfg.stream)
    writer = streamed() if cfg.hf else trace_run(run, cfg.which, what, folder, cfg.trust)
    terminal.say(f"trace: {folder}, {writer.n_tokens:,} tokens, {writer.about.sampling}")
    return Trace(folder)


def look_at(trace: Trace, what: What, cfg: InspectorConfig) -> Look:
    """A trace with whatever is known of its run beside it: tokenizer and history, and what its model is asked."""
    run = Path(trace.about.run)
    tokenizer, history = None, None
    try:
        tokenizer = read_tokenizer(run)[0] if cfg.hf else Tokenizer.load(run / "tokenizer")
        if tokenizer.fingerprint != trace.about.tokenizer:
            raise BadInput(f"{run / 'tokenizer'} is another one than the trace's.")
    except BadInput as missing:
        tokenizer = None
        terminal.say(f"note: token ids are shown, because {str(missing).rstrip('.')}.")
    if (run / "metrics.jsonl").is_file():
        history = read_history(run)
    inspection = inspect(trace, MOST)
    probed, unasked = asked(trace, what, cfg)
    return Look(run.name, inspection, tokenizer, history, weigh(inspection), probed, unasked)


def asked(trace: Trace, what: What, cfg: InspectorConfig) -> tuple[Probed | None, str]:
    """What the run's model says beyond its trace; or why it was not asked."""
    n_experts, run = sum(trace.about.n_experts), Path(trace.about.run)
    if not cfg.run:
        return (
            None,
            "Not asked: that takes a run, which python -m experiments.convert makes of transformers’ folders.",
        )
    tokens = (PROBED if n_experts <= FEW else 0) if cfg.probe == -1 else cfg.probe
    if not tokens:
        return None, f"Not asked: masking {n_experts} experts in turn takes as many passes. probe={PROBED} does it."
    terminal.say(f"probe: {n_experts} experts of {run}, masked in turn on {tokens:,} tokens")
    return probe(run, cfg.which, dataclasses.replace(what, tokens=tokens), cfg.trust), ""


def say(look: Look) -> None:
    """The verdict, what stands out, and a row per layer."""
    terminal.say(f"{look.name}: {verdict(look.inspection)}")
    told = findings(look.inspection)
    if told and told[0].severity > 1:
        terminal.say(f"  Try first: {told[0].advice}.")
        told = told[1:]
    for finding in told:
        terminal.say(f"  {finding.text}" + (f" Try first: {finding.advice}." if finding.advice else ""))
    table = layer_table(look.inspection)
    tables.print_table(table.headings, table.rows)


if __name__ == "__main__":
    main()
