"""A run's folder: config.yaml, tokenizer/, metrics.jsonl, routing/counts.jsonl, checkpoints/, summary.json.

Every file is written under a temporary name and renamed, or appended line by line, so that whatever is there is whole.
"""

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moe.config.parse import to_dict
from moe.config.router import OWN, facts
from moe.config.run import FREE, Config, build, fingerprint, is_among, may_change
from moe.data.owner import temporary
from moe.data.tokenizer import HEADER, RANKS, TEMPLATE, Tokenizer
from moe.errors import BadInput
from moe.run import checkpoint
from moe.run.command_line import command_line, override
from moe.run.jsonl import write_atomically
from moe.run.lock import holding
from moe.run.trust import check_router


def default_folder(cfg: Config, swept: str = "") -> Path:
    """runs/<model>-<router or dense>-<data>-seed<seed>-<hash of the settings>: equal settings, equal folder. `swept`,
    the values of a sweep's job, takes the place of the seed."""
    kind = cfg.router.name.rpartition(":")[2] if cfg.model.moe else "dense"
    return Path("runs") / f"{cfg.model.name}-{kind}-{cfg.data.name}-{swept or f'seed{cfg.seed}'}-{fingerprint(cfg)}"


def read_config(run: Path, trust: bool | str = False, key: str = "run") -> Config:
    """The config a run was started with. A router of one's own that it names is refused, unless it is what `trust`
    says (`moe.run.trust.check_router`): what the folder itself says of trust counts for nothing. `key`: the setting
    that gives the folder. Raises `BadInput` for that, and for a folder that is not a run's."""
    cfg = read_settings(run, key)
    check_router(run, cfg.router.name, trust)
    return cfg


def read_settings(run: Path, key: str = "run") -> Config:
    """The config of `read_config`, whatever router it names: for one who imports none. Raises `BadInput` for a folder
    that is not a run's."""
    path = run / "config.yaml"
    if not path.is_file():
        runs: list[str] = []
        for folder in (run, run.parent):  # a comparison's folder has its runs inside
            runs = runs or sorted(str(config.parent) for config in folder.glob("*/config.yaml"))
        hint = f"; there are {', '.join(runs)}" if runs else ""
        raise BadInput(f"{key}={run} is not a run's folder: it has no config.yaml{hint}.")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: no text, or no date
        raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
    try:
        return dataclasses.replace(build(tree), trust=False)
    except BadInput as bad:
        raise BadInput(f"{path}: {bad}") from None


def command_to_resume(run: Path, cfg: Config) -> str:
    """What to type to go on with the run in folder `run`."""
    trust = ["trust=true"] if cfg.trust or facts(cfg.router) is OWN else []
    return command_line("train", override("run", str(run)), "resume=true", *trust)


def create_folder(
    run: Path, cfg: Config, tokenizer: Tokenizer, fill: Callable[[Path], object] = lambda folder: None
) -> None:
    """A new run's folder, with its resolved config, its tokenizer and what `fill` writes into it: whole, or not at all.
    Raises `BadInput` when it cannot be written."""
    beside = temporary(run)
    try:
        (beside / "tokenizer").mkdir(parents=True)
        tokenizer.save(beside / "tokenizer")
        write_config(beside, cfg)
        fill(beside)
        beside.rename(run)
    except OSError as error:
        if (run / "config.yaml").exists():
            raise BadInput(f"run={run} was created by another process at this moment{_held(run)}.") from error
        raise BadInput(f"run={run} cannot be created ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def mend_folder(run: Path, cfg: Config, tokenizer: Tokenizer) -> None:
    """Write again what was deleted of that which `create_folder` wrote. Raises `BadInput` when it cannot be written."""
    try:
        (run / "tokenizer").mkdir(exist_ok=True)
        names = (HEADER, RANKS) if tokenizer.template is None else (HEADER, RANKS, TEMPLATE)
        if not all((run / "tokenizer" / name).exists() for name in names):
            tokenizer.save(run / "tokenizer")
    except OSError as error:
        raise BadInput(f"{run / 'tokenizer'} cannot be written ({error.strerror or error}).") from error
    if not (run / "config.yaml").exists():
        write_config(run, cfg)


def refuse_existing(run: Path, resume: bool) -> None:
    """Refuse a folder that exists and is not to be gone on with, that a live process trains, or that was never trained
    here. Raises `BadInput`."""
    if not run.exists():
        return
    held = _held(run)
    if not resume:
        raise BadInput(f"run={run} exists{held}: add resume=true to go on with it, or choose another run.")
    if held:
        raise BadInput(f"run={run} exists{held}: let that end, or end it, and try again.")
    _, meta = checkpoint.newest_meta(run / "checkpoints") or (None, {})
    if meta.get("loader", {}) is None:
        raise BadInput(
            f"run={run} was imported, and there is no training to go on with: start a new run from its weights with "
            f"source={run} run=NEW."
        )


def _held(run: Path) -> str:
    return f" and is being trained by {words}" if (words := holding(run)) else ""


def write_config(run: Path, cfg: Config) -> None:
    """Replace the run's config.yaml. Raises `BadInput` when it cannot be written."""
    tree = to_dict(cfg) | {"resume": False, "trust": False}
    write_atomically(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False))


def check_same(old: Config, new: Config) -> list[str]:
    """Refuse to go on with settings that the steps already taken would have depended on: the result would be neither
    run's. Returns a sentence for each other setting that changes. Raises `BadInput` naming the first refused key."""
    changes = []
    for key, before, after in differences(old, new):
        if key == "source":
            began = f"began from {before}" if before else "did not begin from another's weights"
            raise BadInput(
                f"source={after} is given, and {new.run} {began}: leave it out to go on with {new.run}, or choose "
                "another run."
            )
        if not may_change(key, old):
            state = ["source_state=all"] if key == "train.steps" or key.startswith("optim.") else []
            anew = shlex.join([override("source", new.run), *state, "run=NEW", override(key, after)])
            raise BadInput(
                f"{key}={after} differs from the run's own {before}: leave it out to go on with {new.run}, choose "
                f"another run, or start a new run from this one's weights with {anew}."
            )
        if not is_among(key, FREE):
            changes.append(f"{key} was {before} and is {after} from here on.")
    return changes


def check_unedited(run: Path, cfg: Config, groups: tuple[str, ...] = ()) -> None:
    """Refuse a config.yaml, read as `cfg`, that says other than what the run was trained with, which its newest
    checkpoint holds under a checksum; `groups`: only of these groups of settings. Raises `BadInput` naming the key."""
    path, meta = checkpoint.newest_meta(run / "checkpoints") or (None, {})
    if path is None or "config" not in meta:
        return
    for key, trained, here in differences(checkpoint.config_of(path, meta), cfg):
        if not may_change(key, cfg) and (not groups or is_among(key, groups)):
            raise BadInput(
                f"{run / 'config.yaml'} has {key}={here}, and {path} was trained with {trained}: put {trained} back, "
                f"or choose another run to train with {here}."
            )


def differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every setting that differs, in the order of the settings."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    for key in dict.fromkeys([*after, *before]):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def check_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Refuse to go on with a tokenizer other than the run's own, which its checkpoints and its samples depend on."""
    kept = Tokenizer.load(run / "tokenizer").fingerprint
    if kept != tokenizer.fingerprint:
        raise BadInput(
            f"run={run} has another tokenizer ({kept[:12]}) than the data now gives ({tokenizer.fingerprint[:12]}): go "
            "on with the data it was started with, or start a new run."
        )


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return settings
