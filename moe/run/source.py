"""What a new run that starts from another's weights takes of its settings, and whether those it has itself fit them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.config.data import TokenizerConfig
from moe.config.parse import assign, lookup, to_dict
from moe.config.run import Config, is_among, validate
from moe.data.tokenizer import HEADER
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint
from moe.run.folder import check_unedited, differences, read_config
from moe.run.load import no_source
from moe.run.trust import check_router

LEARNED = ("bpe", "char")  # tokenizers that another text would make otherwise
WEIGHTS = ("model", "router", "balance")  # the settings that say which weights there are


def read_source(source: str, trust: bool | str) -> tuple[Config, Path | None]:
    """The settings of the run, or of the checkpoint, in folder `source`, and the run's folder where it is known. A
    router of one's own is refused as by `read_config`. Raises `BadInput`."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        cfg = read_config(folder, trust, "source")
        check_unedited(folder, cfg, (*WEIGHTS, "data.documents"))
        return cfg, folder
    if not (folder / checkpoint.MANIFEST).is_file():
        raise BadInput(no_source(source))
    cfg = checkpoint.config_of(folder, checkpoint.meta_of(folder))
    run = Path(*folder.absolute().parts[:-2])
    check_router(run, cfg.router.name, trust)
    return cfg, run if (run / "config.yaml").is_file() else None


def adopt(cfg: Config, source: Config, run: Path | None, keys: Sequence[str]) -> Config:
    """`cfg` with the model, router, balance, tokenizer and data.documents of its source where `keys`, the settings and
    groups that were given for it, do not name them. Raises `BadInput` for a given one that does not fit the source's
    weights. `source`, `run`: as `read_source` returns them."""
    # A recording is of the source's own batches.
    whole = copy.deepcopy(cfg)
    whole.model, whole.router = copy.deepcopy(source.model), copy.deepcopy(source.router)
    whole.balance, whole.data.documents = copy.deepcopy(source.balance), source.data.documents
    if whole.balance.force == "recorded":
        whole.balance.force, whole.balance.recorded = "none", ""
    whole.tokenizer = tokenizer_of(cfg, source, run, keys)

    # What was given lies over it.
    for key in keys:
        if is_among(key, (*WEIGHTS, "tokenizer", "data.documents")):
            put(whole, key, lookup(cfg, key))
    if whole.model.vocab_size == 0:
        whole.model.vocab_size = source.model.vocab_size
    check_fits(whole, source)
    return whole


def put(cfg: Config, key: str, value: Any) -> None:
    """Set the setting or group at a dotted key. Raises `BadInput` where its group is null."""
    path, _, name = key.rpartition(".")
    group = lookup(cfg, path) if path else cfg
    if group is None:
        raise BadInput(f"{key}={value} means nothing here: {path} is null in the source={cfg.source}.")
    assign(group, name, copy.deepcopy(value))


def tokenizer_of(cfg: Config, source: Config, run: Path | None, keys: Sequence[str]) -> TokenizerConfig:
    """The source's tokenizer: as it was asked for where the text would make the same again, else the saved one."""
    same_text = read_alike(cfg) == read_alike(source) or cfg.source_state == "all"
    given = any(is_among(key, ("tokenizer",)) for key in keys)
    saved = run is not None and (run / "tokenizer" / HEADER).is_file()
    if source.tokenizer.name not in LEARNED or same_text or given or not saved:
        return copy.deepcopy(source.tokenizer)
    return TokenizerConfig("saved", source.tokenizer.vocab_size, str(run))


def read_alike(cfg: Config) -> dict[str, Any]:
    """The settings that decide which text is read."""
    return to_dict(replace(cfg.data, cache="", workers=0, on_error="refuse", documents="packed"))


def check_fits(cfg: Config, source: Config) -> None:
    """Refuse settings with which the model would have other weights than its source's. Raises `BadInput` that names
    those that make the difference."""
    validate(cfg)
    if shapes(cfg) == shapes(source):
        return
    changed = [entry for entry in differences(source, cfg) if is_among(entry[0], WEIGHTS) and entry[0] != "model.name"]
    if (cfg.model.moe is None) != (source.model.moe is None):
        was, now = ("null" if of.model.moe is None else "{...}" for of in (source, cfg))
        refused = [("model.moe", was, now)]
    else:
        refused = [entry for entry in changed if matters(source, entry[0], entry[2])] or changed
    (key, was, now), others = refused[0], [key for key, _, _ in refused[1:]]
    also = f" (as do {', '.join(others)})" if others else ""
    raise BadInput(
        f"{key}={now} does not fit the weights of source={cfg.source}, which have {was}{also}: leave it out, and "
        "the source's own is taken."
    )


def matters(source: Config, key: str, value: Any) -> bool:
    """Whether this one setting gives the source's model other weights."""
    cfg = copy.deepcopy(source)
    try:
        put(cfg, key, value)
        return shapes(cfg) != shapes(source)
    except Exception:  # with this one alone there is no such model
        return True


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model by its name; none is allocated."""
    with torch.device("meta"):
        model = Transformer(cfg.model, cfg.router, cfg.balance)
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
