"""What fine-tuning did to routing: which tokens go to other experts, and how loads and domains moved, before and after.

    python -m experiments.rerouting before=runs/base after=runs/tuned                       # the text that tuned had
    python -m experiments.rerouting before=runs/base after=runs/tuned data=blend            # another corpus
    python -m experiments.rerouting before=runs/base after=runs/tuned text=notes.txt        # a text of one's own
    python -m experiments.rerouting before=runs/a after=runs/a which_before=step-100        # two checkpoints of a run

Two runs with the same MoE layers, experts and tokenizer. *by states* and *by router* are the flips that the one alone
would make: moe/analysis/rerouting.py says what these can tell. `out` writes the same as JSON lines (`Rerouted`), with
every expert's share of every domain: null is what is unknown, and in `domain` all.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from moe.analysis.rerouting import Interval, Rerouted, Routed, check_alike, compare
from moe.analysis.tracing import What, windows_of_run
from moe.config import data as data_config
from moe.config.data import DataConfig
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.jsonl import write_lines
from moe.run.load import find_checkpoint, load_run

FLIPS = ("layer", "text", "flips", "95% interval", "chance", "changed", "95% interval", "chance", "by states")
LOADS = ("layer", "MaxVio", "effective experts", "dead", "bits of domain", "95% before", "95% after", "dealt labels")
MOVES = ("layer", "expert", "text", "before", "after", "difference")
MOVED = 8  # experts and domains that are printed


@dataclass
class ReroutingConfig:
    """Which two models, and on which text."""

    before: str = ""  # a run's folder
    after: str = ""  # another's, or the same at another checkpoint
    which_before: str = "best"  # best (lowest validation loss) | last | step-N
    which: str = "best"  # the same, of after
    text: str = ""  # a file of UTF-8 text, one document, or of token ids (.npy); "": the validation text of `data`
    data: DataConfig = field(default_factory=DataConfig)  # a corpus; not given: that of after
    tokens: int = 100_000  # at most so many, spread evenly; 0: all
    context: int = 0  # tokens of a window; 0: as many as both models read
    out: str = ""  # a file to write, in JSON lines; "": none
    trust: bool = False  # run a router of one's own that the runs name

    def __post_init__(self) -> None:
        for key in ("before", "after"):
            if not getattr(self, key):
                raise BadInput(f"{key}=... is needed: a run's folder.")
        data_config.validate(self.data)
        What(self.text, self.tokens, context=self.context)


@cli.command("rerouting", ReroutingConfig, verbatim=("before", "after", "text", "out"))
def main(cfg: ReroutingConfig) -> None:
    """Compare, print the tables, and write the lines."""
    # What cannot be is refused before anything runs.
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"out={cfg.out} exists: choose another, or move it away.")
    before, before_tokenizer, _ = load_run(Path(cfg.before), cfg.which_before, cfg.trust)
    after, tokenizer, run_cfg = load_run(Path(cfg.after), cfg.which, cfg.trust)
    if tokenizer.fingerprint != before_tokenizer.fingerprint:
        raise BadInput(f"before={cfg.before} and after={cfg.after} have other tokenizers: accepted are runs with one.")
    check_alike(before, after)
    # The text, in the batches of the validation.
    context = cfg.context or min(before.cfg.context, after.cfg.context)
    batch_size = run_cfg.train.batch_size // run_cfg.train.accumulate
    data = cfg.data if cli.gives("data") else None
    windows = windows_of_run(What(cfg.text, cfg.tokens, batch_size, context, data), run_cfg, tokenizer)
    # Compare, and say it.
    device = machine.choose_device("auto")
    rows = compare(before.to(device), after.to(device), windows)
    names = [
        f"{run}, {find_checkpoint(Path(run) / 'checkpoints', which).name}"
        for run, which in ((cfg.before, cfg.which_before), (cfg.after, cfg.which))
    ]
    terminal.say(f"before: {names[0]}; after: {names[1]}; {windows.sampling}; intervals over {rows[0].unit}")
    tables.print_table((*FLIPS, "by router"), [flips(row) for row in rows], left=2)
    print()
    tables.print_table(LOADS, [loads(row) for row in rows if row.domain is None])
    print()
    tables.print_table(MOVES, moves(rows), left=3)
    if cfg.out:
        about = {"before_source": names[0], "after_source": names[1], "sampling": windows.sampling}
        write_lines(Path(cfg.out), (about | vars(row) for row in rows))
        terminal.say(f"lines: {cfg.out}")


def flips(row: Rerouted) -> tuple[str, ...]:
    """Which tokens go elsewhere, against chance, and by what."""
    parts = ["" if part is None else f"{part.value:.3f}" for part in (row.by_states, row.by_router)]
    seen = [f"{row.flips.value:.3f}", interval(row.flips), f"{row.chance_flips:.3f}"]
    lost = [f"{row.changed.value:.3f}", interval(row.changed), f"{row.chance_changed:.3f}"]
    return str(row.layer), row.domain or "all", *seen, *lost, *parts


def interval(of: Interval) -> str:
    """From and to."""
    return f"{of.low:.3f} to {of.high:.3f}"


def loads(row: Rerouted) -> tuple[str, ...]:
    """How even loads are and what experts tell of domains, before -> after."""
    of = (row.before, row.after)
    pair = lambda form, name: " -> ".join(format(getattr(side, name), form) for side in of)
    even = [pair(".2f", "max_vio"), pair(".2f", "effective_experts"), pair("d", "dead")]
    return str(row.layer), *even, *bits(row.before, row.after)


def bits(before: Routed, after: Routed) -> tuple[str, ...]:
    """Bits of domain, their intervals and what dealt labels give; nothing where there are no domains to tell."""
    if before.bits is None or after.bits is None:
        return ("", "", "", "")
    pair = lambda name: f"{getattr(before.bits, name):.4f} -> {getattr(after.bits, name):.4f}"
    ends = [f"{of.low:.4f} to {of.high:.4f}" for of in (before.bits, after.bits)]
    return pair("value"), *ends, pair("chance")


def moves(rows: list[Rerouted]) -> list[tuple[str, ...]]:
    """The experts whose share of a domain's tokens moved most; of a text without domains, of the text's."""
    domains = [row for row in rows if row.domain is not None]
    cells = [
        (after - before, row, e, before, after)
        for row in domains
        for e, (before, after) in enumerate(zip(row.before.share_E, row.after.share_E, strict=True))
    ]
    cells.sort(key=lambda cell: -abs(cell[0]))
    return [
        (str(row.layer), str(e), row.domain or "all", f"{before:.3f}", f"{after:.3f}", f"{moved:+.3f}")
        for moved, row, e, before, after in cells[:MOVED]
    ]


if __name__ == "__main__":
    main()
