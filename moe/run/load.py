"""A run's model, tokenizer and settings, read back from its folder."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.run import Config
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model import adapt, quantized
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint, streamed
from moe.run.folder import check_unedited, read_config
from moe.run.streamed import Tensors

FITTED = ("model", "router", "balance", "data.documents")  # the settings that weights are weights of


def load_run(
    run: Path, which: str = "best", trust: bool | str = False, experts: str = ""
) -> tuple[Transformer, Tokenizer, Config]:
    """The model (on the CPU), tokenizer and config of the run in folder `run`.

    which: best (lowest validation loss) | last | step-N. trust: as in `read_config`. experts: the format that routed
    experts are stored in, for inference (moe/model/quantized.py); "": as they are. Tensors are read one at a time, so
    that the peak is the model, its experts in that format, and a tensor. Raises `BadInput` for a folder that holds no
    run, a router of one's own that is not trusted, a checkpoint that does not exist or is damaged, a tokenizer that is
    not the one the checkpoint was trained with, and experts that the format cannot store."""
    cfg = read_config(run, trust)
    if experts:
        quantized.check_storable(cfg.model, experts)
    path = find_checkpoint(run / "checkpoints", which)
    tensors, tokenizer = _opened(run, path, cfg)
    about = cfg.model, cfg.router, cfg.balance, cfg.data.document_end(tokenizer.eot)
    with quantized.stacks_on_meta() if experts else nullcontext():
        model = Transformer(*about, reward=cfg.objective.name == "reward").eval()
    expected = model_tensors(model)
    _check_fit(run, path, tensors, expected)
    with torch.no_grad():
        for name, w in expected.items():
            if not w.is_meta:
                w.copy_(tensors[name])
    if experts:
        quantized.store(model, experts, tensors.__getitem__)
    return model, tokenizer, cfg


def open_run(run: Path, which: str = "best", key: str = "run") -> tuple[Tensors, Tokenizer, Config]:
    """What `load_run` gives, but for the model: its tensors, each read when it is asked for. Raises `BadInput` as that
    does; `key` is the setting that names the folder."""
    cfg = read_config(run, key=key)
    path = find_checkpoint(run / "checkpoints", which)
    tensors, tokenizer = _opened(run, path, cfg)
    with torch.device("meta"):
        expected = model_tensors(Transformer(cfg.model, cfg.router, cfg.balance))
    _check_fit(run, path, tensors, expected)
    return tensors, tokenizer, cfg


def _opened(run: Path, path: Path, cfg: Config) -> tuple[Tensors, Tokenizer]:
    """The tensors of a run's checkpoint `path`, and the tokenizer that it was trained with. Raises `BadInput`."""
    checkpoint.verify(path)
    if checkpoint.is_sharded(path):
        weights = checkpoint.load(path).model
        tensors = _whole(streamed.Tensors(weights, lambda name: weights[name]))
    else:
        tensors = _whole(streamed.opened(path / checkpoint.TENSORS["model"]))
    tokenizer = _its_tokenizer(run, path, checkpoint.meta_of(path))
    check_unedited(run, cfg, FITTED)
    return tensors, tokenizer


def _check_fit(run: Path, path: Path, tensors: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Raises `BadInput` unless every tensor of the model is there, and no other."""
    for name in dict.fromkeys([*expected, *tensors]):
        here, needed = (tuple(group[name].shape) if name in group else None for group in (tensors.meta, expected))
        if here != needed:
            said = f"has shape {here}, and the settings say {needed}" if here and needed else "is not part of the model"
            reason = f"the weight {name} {said if here is not None else 'is missing'}."
            raise BadInput(f"{path} does not fit {run / 'config.yaml'}: {reason}")


def _whole(tensors: Tensors) -> Tensors:
    """The tensors of the plain model, whatever was trained of it."""
    pieces = adapt.pieces(tensors)
    meta = {name: tensors.meta[of.get("base", of["original"])] for name, of in pieces.items()}
    return Tensors(meta, lambda name: adapt.whole({kind: tensors[key] for kind, key in pieces[name].items()}))


def _its_tokenizer(run: Path, path: Path, meta: dict[str, Any]) -> Tokenizer:
    """The run's tokenizer, with which its checkpoint `path` was trained, as the meta says. Raises `BadInput`."""
    tokenizer = Tokenizer.load(run / "tokenizer")
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise BadInput(
            f"{run / 'tokenizer'} has fingerprint {tokenizer.fingerprint}, and {path} was trained with the tokenizer "
            f"{meta['tokenizer']}: put that one back, or choose another run."
        )
    return tokenizer


def find_source(source: str) -> Path:
    """The checkpoint that `source` names: the newest good one of a run's folder, or the folder of one.

    Raises `BadInput` for anything else."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        return find_checkpoint(folder / "checkpoints", "last")
    if not (folder / checkpoint.MANIFEST).is_file():
        raise BadInput(no_source(source))
    checkpoint.verify(folder)
    return folder


def load_source(source: str, tokenizer: str) -> checkpoint.Snapshot:
    """The checkpoint in folder `source`. Raises `BadInput` for one that was trained with another tokenizer than the one
    with this fingerprint."""
    snapshot = checkpoint.load(Path(source))
    if (its := snapshot.meta["tokenizer"]) != tokenizer:
        raise BadInput(
            f"source={source} was trained with another tokenizer ({its[:12]}) than this run's ({tokenizer[:12]}): the "
            "two must read the same ids."
        )
    return snapshot


def no_source(source: str) -> str:
    """What is wrong with a `source` that is nothing of the kind."""
    if (Path(source) / "config.json").is_file():
        return (
            f"source={source} is a folder of transformers: make it a run first, with python -m experiments.convert "
            f"source={source} to=runs/NAME, and take that."
        )
    return (
        f"source={source} is neither a run's folder nor a checkpoint: accepted are runs/NAME and "
        "runs/NAME/checkpoints/step-00000100."
    )


def find_checkpoint(root: Path, which: str) -> Path:
    """The checkpoint in `root` that `which` means, as in `load_run`. Raises `BadInput` where there is none."""
    step = {path.name: int(path.name[5:]) for path in sorted(root.glob("step-*")) if path.name[5:].isdecimal()}
    if not step:
        raise BadInput(f"{root} has no checkpoint: the run has not saved one yet.")
    if which == "best" and len(step) == 1:  # scored or not
        which = "last"
    if which == "best":
        best = checkpoint.best(root)
        if best is None:
            raise BadInput(f"which=best: no good checkpoint in {root} has a validation loss; use which=last.")
        return best
    if which == "last":
        newest = checkpoint.latest(root, warnings.warn)
        assert newest is not None, f"{root} had {list(step)}"
        return newest
    for name in step:
        if which in (name, f"step-{step[name]}"):
            return root / name
    raise BadInput(f"which={which} is not one of best, last, {', '.join(step)}.")
