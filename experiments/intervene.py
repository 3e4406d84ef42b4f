"""Route otherwise than the router does, and see what it costs: experts masked, swapped, forced, replayed or kept.

    python -m experiments.intervene run=runs/demo/moe-seed0 mask=1:3                 # no token may choose expert 3
    python -m experiments.intervene run=runs/demo/moe-seed0 drop=0:2,1:3             # rows are lost, none takes over
    python -m experiments.intervene run=runs/demo/moe-seed0 swap=1:0-3               # each takes the other's rows
    python -m experiments.intervene run=runs/demo/moe-seed0 force=1:0,1:3            # every token takes 0 and 3
    python -m experiments.intervene run=runs/demo/moe-seed0 replay=runs/demo-trace   # the experts of a trace
    python -m experiments.intervene run=runs/demo/moe-seed0 keep=0.25                # the busiest quarter alone
    python -m experiments.intervene run=runs/demo/moe-seed0 importance=true          # every expert masked in turn

Experts are LAYER:EXPERT, layers counted from 0 among all layers. `out` writes the same as JSON lines (`Effect` of
moe/analysis/effects.py). What happens to weights stands in moe/analysis/interventions.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.pages import tables
from moe.analysis import effects as effects_module
from moe.analysis.effects import Difference, Effect, Hurt, Variant, effects, every_expert, measure
from moe.analysis.interventions import Change, Window, check
from moe.analysis.trace import Trace
from moe.analysis.tracing import What, windows_of_run
from moe.config.model import layer_moe, moe_layers
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run import machine, terminal
from moe.run.jsonl import write_lines
from moe.run.load import find_checkpoint, load_run

HEADINGS = ("", "before", "after", "difference", "95% interval", "tokens")
SHOWN = 20  # experts of importance=true that are printed
KINDS = ("mask", "drop", "swap", "force", "replay", "keep", "importance")
LEFT = 5  # tokens before a hurt one that are shown


@dataclass
class InterveneConfig:
    """Of which run, what is changed, and on which text it is measured."""

    run: str = ""  # a run's folder
    mask: str = ""  # LAYER:EXPERT,...: no token may choose these
    drop: str = ""  # LAYER:EXPERT,...: their rows are lost
    swap: str = ""  # LAYER:EXPERT-EXPERT,...: each takes the other's rows
    force: str = ""  # LAYER:EXPERT,...: every token of these layers takes these experts
    replay: str = ""  # a trace of the same text: its experts are taken
    keep: float = 0.0  # the share of every layer's experts that stays
    importance: bool = False  # every expert is masked in turn
    which: str = "best"  # best (lowest validation loss) | last | step-N
    text: str = ""  # a file of UTF-8 text, one document; "": the run's validation text
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    out: str = ""  # a file to write, in JSON lines; "": none
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run=... is needed: the run's folder.")
        chosen = [name for name in KINDS if getattr(self, name)]
        if len(chosen) != 1:
            raise BadInput(f"one of {', '.join(KINDS)} is needed, and given are {', '.join(chosen) or 'none'}.")
        if self.keep and not 0 < self.keep < 1:
            raise BadInput(f"keep={self.keep} is out of range: accepted is above 0 and below 1, like 0.25.")
        _ = self.changes, self.what

    @property
    def what(self) -> What:
        """Which text."""
        return What(self.text, self.tokens)

    @property
    def changes(self) -> list[Change]:
        """What mask, drop, swap and force ask for. Raises `BadInput` for what is no LAYER:EXPERT."""
        return [
            change for kind in ("mask", "drop", "swap", "force") for change in read_changes(kind, getattr(self, kind))
        ]


def read_changes(kind: str, text: str) -> list[Change]:
    """A change per layer that the text names: "2:5,3:1", of a swap "2:5-7"."""
    form = "LAYER:EXPERT-EXPERT" if kind == "swap" else "LAYER:EXPERT"
    experts: dict[int, list[int]] = {}
    for word in text.split(",") if text else []:
        layer, _, numbers = word.strip().partition(":")
        listed = numbers.split("-")
        if not all(number.isdecimal() for number in (layer, *listed)) or len(listed) != form.count("EXPERT"):
            raise BadInput(f"{kind}={text} has {word.strip() or 'nothing'} in it: accepted is {form}, by commas.")
        experts.setdefault(int(layer), []).extend(map(int, listed))
    return [Change(kind, layer, numbers) for layer, numbers in experts.items()]


@cli.command("intervene", InterveneConfig, verbatim=("run", "out", "text", "replay", "mask", "drop", "swap", "force"))
def main(cfg: InterveneConfig) -> None:
    """Measure, print a table by domain and the most hurt tokens, and write the lines."""
    # What cannot be is refused before anything runs.
    if cfg.out:
        check_out(Path(cfg.out))
    model, tokenizer, run_cfg = load_run(Path(cfg.run), cfg.which, cfg.trust)
    model = model.to(machine.choose_device("auto"))
    check(model, cfg.changes)
    windows = windows_of_run(cfg.what, run_cfg, tokenizer)
    batches, domains = list(windows), windows.domains
    # Measure.
    if cfg.keep:
        told = effects_module.keep(model, batches, domains, cfg.keep)
    else:
        variants = variants_of(cfg, model, batches)
        if cfg.importance:
            terminal.say(f"importance: {len(variants)} experts, a pass for each")
        told = effects(measure(model, batches, domains, variants), variants)
    # Say it.
    checkpoint = find_checkpoint(Path(cfg.run) / "checkpoints", cfg.which).name
    terminal.say(f"{cfg.run}, {checkpoint}: {windows.sampling}; nats per token, intervals over {told[0].unit}")
    show(told, batches, tokenizer)
    if cfg.out:
        about = {"run": cfg.run, "checkpoint": checkpoint, "sampling": windows.sampling}
        write_lines(Path(cfg.out), (about | vars(effect) for effect in told))
        terminal.say(f"lines: {cfg.out}")


def check_out(path: Path) -> None:
    """Make the folder that a file goes to. Raises `BadInput` for a file that exists, and a folder that cannot be."""
    if path.exists():
        raise BadInput(f"out={path} exists: choose another, or move it away.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"out={path} cannot be written ({error.strerror or error}).") from error


def variants_of(cfg: InterveneConfig, model: Transformer, batches: list[Window]) -> list[Variant]:
    """What is asked for."""
    if cfg.importance:
        return every_expert(model)
    if cfg.replay:
        return [Variant(f"replay {Path(cfg.replay).name}", (), recorded_in(Path(cfg.replay), model, batches))]
    (kind,) = {change.kind for change in cfg.changes}
    return [Variant(f"{kind} {getattr(cfg, kind)}", cfg.changes)]


def recorded_in(folder: Path, model: Transformer, batches: list[Window]) -> np.ndarray:
    """The experts of a trace, (T, L, K). Raises `BadInput` for a trace of another text, or of a model whose layers or
    experts are others."""
    trace, layers = Trace(folder), moe_layers(model.cfg)
    moes = [layer_moe(model.cfg, layer) for layer in layers]
    here = layers, [moe.n_experts + moe.n_cheap for moe in moes], all(router.fixed_k for router in model.routers())
    about = trace.about
    if (about.layers, about.n_experts) != here[:2] or (here[2] and about.k != max(moe.k for moe in moes)):
        raise BadInput(
            f"replay={folder} is a trace of another model: it has MoE layers {about.layers} of {about.n_experts} "
            f"experts, {about.k} a token, and the run has {here[0]} of {here[1]}, {max(moe.k for moe in moes)} a token."
        )
    read_T = np.concatenate([batch[0][:, :-1].ravel() for batch in batches])
    if not np.array_equal(trace.table("tokens", ["token"])["token"].to_numpy(), read_T):
        raise BadInput(
            f"replay={folder} is a trace of another text ({about.sampling}): give the text= and tokens= that it was "
            "made with, of a run with the same tokenizer."
        )
    return trace.experts()


def show(told: list[Effect], batches: list[Window], tokenizer: Tokenizer) -> None:
    """A row in all and by domain; of many effects a row each, the largest first."""
    if len(told) == 1:
        (effect,) = told
        parts = [("all", effect.total), *effect.domains.items()]
        tables.print_table((effect.what, *HEADINGS[1:]), [cells(*part) for part in parts])
        tables.print_table(
            ("most hurt: read", "to predict", "before", "after"), hurt_rows(effect.hurt, batches, tokenizer), 2
        )
        return
    told = told if told[0].what.startswith("by use") else sorted(told, key=lambda e: -e.total.difference)
    worst = [max(effect.domains.items(), key=lambda pair: pair[1].difference) for effect in told[:SHOWN]]
    rows = [
        (*cells(effect.what, effect.total), f"{name} {difference.difference:+.4f}")
        for effect, (name, difference) in zip(told, worst, strict=False)
    ]
    tables.print_table((*HEADINGS, "most in"), rows)
    if len(told) > SHOWN:
        terminal.say(f"and {len(told) - SHOWN} more, that matter less: out=FILE has them all")


def cells(what: str, difference: Difference) -> tuple[str, ...]:
    """A row of the table."""
    d = difference
    interval = f"{d.low:+.4f} to {d.high:+.4f}" if d.units > 1 else "unknown: all of one text"
    return what, f"{d.before:.4f}", f"{d.after:.4f}", f"{d.difference:+.4f}", interval, f"{d.tokens:,}"


def hurt_rows(hurt: list[Hurt], batches: list[Window], tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """A row per token, with what stands before it."""
    read_WS1 = np.concatenate([batch[0] for batch in batches])
    rows: list[tuple[str, ...]] = []
    for token in hurt:
        left = read_WS1[token.window, max(0, token.place + 1 - LEFT) : token.place + 1]
        scores = f"{token.before:.2f}", f"{token.after:.2f}"
        rows.append((tokenizer.decode(left.tolist()), tokenizer.decode([token.next]), *scores))
    return rows


if __name__ == "__main__":
    main()
