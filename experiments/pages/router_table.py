"""Every router of conf/router as a table: what it does, how many experts a token takes, whether it sees later tokens.

The columns come from the file's first comment, from its settings, and from what its class says of itself; the tests
hold the classes to that.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import cli
from moe.config.model import layer_moe, moe_layers
from moe.config.parse import nearest
from moe.config.router import facts
from moe.config.run import Config
from moe.errors import BadInput
from moe.routing.build import build_router

FOLDER = cli.CONF / "router"
HEADINGS = (
    "router", "what it does", "a token takes", "later tokens: training", "evaluation", "balance terms", "over ranks",
)  # fmt: skip
# What the ranks of a run decide together, by what a router decides over.
OVER_RANKS = {
    "token": "each for its own",
    "sequence": "each for its own",
    "batch": "all their micro-batch",
    "unknown": "as it is written",
}
LEFT = 2  # columns of words


def rows(names: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """A row for each of these files of conf/router, for all if none is named. Raises `BadInput` for one not there."""
    routers = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    for name in names:
        if name not in routers:
            raise BadInput(f"names has {name!r}, which is not in conf/router; {nearest(name, routers)}.")
    cli.register("train", Config)
    running = GlobalHydra.instance().is_initialized()  # as it is inside a command
    with nullcontext() if running else hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        return [row(name) for name in names or routers]


def row(name: str) -> tuple[str, ...]:
    """What the table says of a router, with the balance and the experts that it comes with."""
    overrides = [f"router={name}", "model=cpu-nano", "model.vocab_size=256"]
    cfg = cli.typed(cli.compose("train", Config, overrides), Config)
    assert cfg.model.moe is not None, f"router={name} composed a dense model"
    moe = layer_moe(cfg.model, moe_layers(cfg.model)[-1])
    with torch.device("meta"):
        where = dict(layer=0, vocab_size=cfg.model.vocab_size, context=cfg.model.context)
        router = build_router(cfg.router, cfg.model.d_model, moe, **where)
    seen = {True: "unseen", False: "seen"}
    return (
        name,
        description(FOLDER / f"{name}.yaml"),
        _taken(cfg, router.fixed_k),
        seen[router.causal and moe.depth == 1],
        seen[router.causal_in_eval],
        _balance(cfg),
        _over_ranks(cfg),
    )


def _over_ranks(cfg: Config) -> str:
    """What several ranks decide over: capacity, which some routers come with, is of the micro-batch of all."""
    return OVER_RANKS["batch" if cfg.balance.capacity else facts(cfg.router).decides]


def _taken(cfg: Config, fixed_k: bool) -> str:
    """How many experts a token takes in evaluation."""
    assert cfg.model.moe is not None
    e, k = cfg.model.moe.n_experts, cfg.model.moe.k
    if facts(cfg.router).choices == "mixture":
        return "a mix of all"
    if not fixed_k:
        return "as many as it wants"
    taken = "all" if k == e else str(k) if k == 1 or cfg.router.second == "random" else "K"
    return f"{taken} of E + {cfg.model.moe.n_cheap}" if cfg.model.moe.n_cheap else taken


def _balance(cfg: Config) -> str:
    """The terms that are on, by the name of their coefficient; a router's own are in what it does."""
    terms = ("aux", "importance", "load", "entropy", "spread", "bandpass", "bias_rate", "capacity", "tile")
    return ", ".join(term for term in terms if getattr(cfg.balance, term)) or "none"


def description(path: Path) -> str:
    """The first comment of a file of conf/, "" where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("#").strip() for line in lines if line.startswith("#") and "@package" not in line)
    return next(filter(None, comments), "")
