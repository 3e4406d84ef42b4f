"""Round a run's weights to few bits, and see what it costs: in all, by domain, by expert, and in routes.

    python -m experiments.quantize run=runs/demo/moe-seed0                          # int8: every matrix, all experts
    python -m experiments.quantize run=runs/demo/moe-seed0 dtype=int4 experts=true  # and each expert by itself
    python -m experiments.quantize run=runs/demo/moe-seed0 dtype=mxfp4              # what experts=mxfp4 stores
    python -m experiments.quantize run=runs/demo/moe-seed0 program=true             # int8 in the C program of export

To int8 and int4 weights are rounded with a scale for each 32 to 64 neighbours of a row (moe/convert/quantize.py), to
other formats as kernels/quantized.py has them; routers, gates, norms, biases and learned positions stay as they are,
and so does the arithmetic. Losses are of the run's validation text, in float32; differences are of the same tokens,
with 95% intervals over documents. With `program` both losses are those of run.c, compiled here, as `python -m
experiments.export format=c` writes it.

`out` writes the same as JSON lines (`Effect` of moe/analysis/effects.py, and `Flipped` for every MoE layer).
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import cli
from experiments.pages import tables
from moe.analysis.decisions import route_flips
from moe.analysis.effects import Difference, Effect, Variant, effects, every_rounding, measure
from moe.analysis.interventions import Window
from moe.analysis.stability import routes
from moe.analysis.tracing import What, windows_of_run
from moe.config.model import moe_layers
from moe.config.parse import OneOf
from moe.config.router import facts
from moe.convert import export_c
from moe.convert.quantize import DTYPES, rounded
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.program import compile_program, score
from moe.model.transformer import Transformer
from moe.run import terminal
from moe.run.folder import read_settings
from moe.run.jsonl import write_lines
from moe.run.load import find_checkpoint, load_run

HEADINGS = ("", "before", "after", "difference", "95% interval", "tokens")


@dataclass
class QuantizeConfig:
    """Of which run, to what, and on which text it is measured."""

    run: str = ""  # a run's folder
    dtype: str = "int8"  # int8 | int4, or fp8 or mxfp4 of kernels/quantized.py
    experts: bool = False  # every expert by itself too
    program: bool = False  # the losses of run.c, which has int8
    which: str = "best"  # best (lowest validation loss) | last | step-N
    text: str = ""  # a file of UTF-8 text, one document; "": the run's validation text
    tokens: int = 100_000  # at most so many, spread evenly over the validation text; 0: all
    out: str = ""  # a file to write, in JSON lines; "": none
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run=... is needed: the run's folder.")
        OneOf(*DTYPES).check("dtype", self.dtype)
        if self.program and (self.dtype != "int8" or self.experts):
            raise BadInput("program=true is for dtype=int8 and experts=false: run.c has every matrix in int8, or none.")
        _ = self.what

    @property
    def what(self) -> What:
        """Which text."""
        return What(self.text, self.tokens)


class Flipped(NamedTuple):
    """Of a MoE layer, among all layers, the share of the tokens whose set of experts is another."""

    what: str
    layer: int
    flipped: float


@cli.command("quantize", QuantizeConfig, verbatim=("run", "out", "text"))
def main(cfg: QuantizeConfig) -> None:
    """Measure, print tables, and write the lines."""
    # What cannot be is refused before anything runs.
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"out={cfg.out} exists: choose another, or move it away.")
    settings = read_settings(Path(cfg.run))
    if settings.model.moe and settings.model.moe.precision != "same":
        raise BadInput(
            f"run={cfg.run} rounds its experts itself (model.moe.precision={settings.model.moe.precision}): accepted "
            "is a run whose products are not rounded, model.moe.precision=same."
        )
    if cfg.program:
        export_c.check(settings)
    model, tokenizer, run_cfg = load_run(Path(cfg.run), cfg.which, cfg.trust)
    windows = windows_of_run(cfg.what, run_cfg, tokenizer)
    batches, domains = list(windows), windows.domains
    # Measure.
    flipped: list[Flipped] = []
    if cfg.program:
        told = in_program(model, tokenizer, batches, domains)
    else:
        variants = every_rounding(model, cfg.dtype, cfg.experts)
        told = effects(measure(model, batches, domains, variants), variants, hurt=0)
        if model.cfg.moe and facts(model.router).choices != "mixture":
            flipped = flips(model, batches, variants[:2])
    # Say it.
    checkpoint = find_checkpoint(Path(cfg.run) / "checkpoints", cfg.which).name
    terminal.say(f"{cfg.run}, {checkpoint}: {windows.sampling}; nats per token, intervals over {told[0].unit}")
    show(told, flipped)
    if cfg.out:
        about = {"run": cfg.run, "checkpoint": checkpoint, "sampling": windows.sampling}
        write_lines(Path(cfg.out), [about | vars(effect) for effect in told] + [about | f._asdict() for f in flipped])
        terminal.say(f"lines: {cfg.out}")


def in_program(model: Transformer, tokenizer: Tokenizer, batches: list[Window], domains: list[str]) -> list[Effect]:
    """What int8 does to the loss of run.c, which is compiled and asked about both."""
    windows_WS1 = np.concatenate([batch[0] for batch in batches])
    nats = {}
    with tempfile.TemporaryDirectory() as place:
        for dtype in ("fp32", "int8"):
            folder = Path(place) / dtype
            export_c.save(model, tokenizer, folder, dtype)
            nats[dtype] = score(compile_program(folder), folder, windows_WS1).ravel()
    # Places of the tokens are the text's; the losses are the program's.
    losses = measure(model, batches, domains, [])
    apart = float(np.abs(nats["fp32"] - losses.before_T).max())
    terminal.say(f"run.c in float32 is at most {apart:.1g} nats from the model here, at any token")
    losses = replace(losses, before_T=nats["fp32"], after_QT=nats["int8"][None])
    return effects(losses, [Variant("run.c int8")], hurt=0)


def flips(model: Transformer, batches: list[Window], variants: list[Variant]) -> list[Flipped]:
    """How many tokens go to other experts, layer by layer."""
    before, told = routes(model, batches), []
    for variant in variants:
        assert variant.rounding
        with rounded(model, variant.rounding):
            after = routes(model, batches)
        shares = [route_flips(*pair) for pair in zip(before, after, strict=True)]
        told += [Flipped(variant.what, *pair) for pair in zip(moe_layers(model.cfg), shares, strict=True)]
    return told


def show(told: list[Effect], flipped: list[Flipped]) -> None:
    """All matrices and all experts by domain, the routes, and the experts, the dearest first."""
    whole = [effect for effect in told if ":" not in effect.what]
    for effect in whole:
        parts = [("all", effect.total), *effect.domains.items()]
        tables.print_table((effect.what, *HEADINGS[1:]), [cells(*part) for part in parts])
    if flipped:
        shares = [(f.what, str(f.layer), f"{f.flipped:.2%}") for f in flipped]
        tables.print_table(("", "layer", "tokens with other experts"), shares)
    single = sorted((effect for effect in told if ":" in effect.what), key=lambda effect: -effect.total.difference)
    if single:
        worst = [max(effect.domains.items(), key=lambda pair: pair[1].difference) for effect in single]
        rows = [
            (*cells(effect.what, effect.total), f"{name} {difference.difference:+.4f}")
            for effect, (name, difference) in zip(single, worst, strict=True)
        ]
        tables.print_table((*HEADINGS, "most in"), rows)


def cells(what: str, d: Difference) -> tuple[str, ...]:
    """A row of the table."""
    interval = f"{d.low:+.5f} to {d.high:+.5f}" if d.units > 1 else "unknown: all of one text"
    return what, f"{d.before:.4f}", f"{d.after:.4f}", f"{d.difference:+.5f}", interval, f"{d.tokens:,}"


if __name__ == "__main__":
    main()
