"""What of a run's settings can be held to the machine before any text is read: what they name has to be there."""

from pathlib import Path

import torch

from moe.config.model import layer_moe, moe_layers
from moe.config.parallel import Layout, check_experts, check_products
from moe.config.parse import to_dict
from moe.config.router import OWN, facts
from moe.config.run import Config
from moe.config.tune import TuneConfig
from moe.data.files import is_there
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model import dispatch
from moe.model.transformer import Transformer
from moe.parallel import launch
from moe.parallel.collectives import this_rank
from moe.routing.build import router_class
from moe.run import machine
from moe.run.folder import default_folder, flat, read_config, refuse_existing
from moe.run.load import find_checkpoint, find_source
from moe.train import trackers


def check(cfg: Config) -> None:
    """Refuse a run whose folder is taken, and one that names a tracker, device, backend, router of one's own,
    tokenizer, source, teacher or recorded run that it cannot have. Nothing is written. Raises `BadInput`."""
    # What is imported, and the folder.
    trackers.check(cfg)
    if cfg.model.moe:
        router_class(cfg.router.name)
    folder = Path(cfg.run) if cfg.run else default_folder(cfg)
    refuse_existing(folder, cfg.resume)
    if (folder / "summary.json").exists():
        return  # what it came from may be gone since

    # The text and the machine.
    if cfg.data.name == "text" and not is_there(cfg.data.path):
        raise BadInput(f"data.path={cfg.data.path} does not exist; accepted is a file, a folder or a glob.")
    dispatch.choose(cfg.dispatch, machine.choose_device(cfg.train.device))

    # Other runs.
    trust = cfg.trust or cfg.router.name
    if cfg.tokenizer.name == "saved":
        Tokenizer.load(Path(cfg.tokenizer.path) / "tokenizer")
    if cfg.source and not folder.exists():
        find_source(cfg.source)
    if cfg.distill.teacher:
        check_teacher(cfg, trust)
    if cfg.balance.recorded and cfg.model.moe:
        read_config(Path(cfg.balance.recorded), trust, "balance.recorded")


def check_ranks(cfg: Config, sizes: Layout, seen: dict[str, str], code: machine.GitState) -> None:
    """Refuse ranks that were started with other settings, code or libraries, or see other files, and settings that
    several ranks cannot share. `seen`: what every rank must see alike. Raises `BadInput` on all ranks alike."""
    ranks = this_rank()
    settings = flat(to_dict(cfg)) | {"train.device": cfg.train.device.partition(":")[0]}
    launch.check_alike({key: str(value) for key, value in settings.items()})
    launch.check_alike(
        {"commit": str(code.commit), "changes of the code": str(code.dirty), **machine.versions()} | seen
    )

    # A part of every micro-batch for each.
    if cfg.train.batch_size % (cfg.train.accumulate * ranks.n):
        raise BadInput(
            f"train.batch_size={cfg.train.batch_size} in train.accumulate={cfg.train.accumulate} micro-batches cannot "
            f"be shared evenly by {ranks.n} ranks: accepted are multiples of {cfg.train.accumulate * ranks.n}."
        )

    # What is decided for one process alone.
    for key, given, accepted in (
        ("objective.name", cfg.objective.name, "lm"),
        ("balance.tile", cfg.balance.tile, 0),
        ("tune.rank", cfg.tune.rank, 0),
        ("tune.experts", cfg.tune.experts, TuneConfig().experts),
    ):
        if given != accepted:
            raise BadInput(f"{key}={given} is for one process: with {ranks.n} ranks accepted is {accepted!r}.")
    for layer in moe_layers(cfg.model) if sizes.ep > 1 else ():
        moe = layer_moe(cfg.model, layer)
        for width in sorted(set(moe.widths)):
            check_experts(moe.widths.count(width), sizes.ep, f"the number of experts of width {width}")
        check_experts(moe.n_experts, sizes.ep)
        check_products(moe.precision == "fp8", sizes.ep)


def check_seen(folder: Path) -> None:
    """Refuse a rank that cannot see the run's folder, which is there. Raises `BadInput`."""
    if not (folder / "config.yaml").exists():
        raise BadInput(
            f"run={folder} cannot be seen by rank {this_rank().rank}: all ranks must see one folder, as on a disk that "
            "their machines share."
        )


def check_teacher(cfg: Config, trust: bool | str) -> None:
    """Refuse a teacher that is no run, has no such checkpoint, or reads less text than its student."""
    folder = Path(cfg.distill.teacher)
    context = read_config(folder, trust, "distill.teacher").model.context
    find_checkpoint(folder / "checkpoints", cfg.distill.which)
    if context < cfg.model.context:
        raise BadInput(f"distill.teacher={folder} has model.context={context}, and this run {cfg.model.context}.")


def rehearse(cfg: Config, document_end: int | None, device: torch.device) -> None:
    """Where the router is one's own, pass a window through a model that is then thrown away: what only its forward
    pass shows ends the run before it has a folder. Global generators are drawn from. Raises `BadInput` for a loss of
    the router's that is called like another, and whatever the router raises."""
    if not cfg.model.moe or facts(cfg.router) is not OWN:
        return
    model = Transformer(cfg.model, cfg.router, cfg.balance, document_end).initialize(cfg.seed).to(device)
    tokens_S = torch.arange(cfg.model.context, device=device) % cfg.model.vocab_size
    with machine.autocast(cfg):
        model(tokens_S[None], backend=cfg.dispatch)
