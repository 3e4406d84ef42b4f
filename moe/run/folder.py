"""A run's folder: config.yaml, tokenizer/, metrics.jsonl, routing/counts.jsonl, checkpoints/, summary.json.

Every file is written under a temporary name and renamed, or appended line by line, so that whatever is there is whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from moe.config.parse import to_dict
from moe.config.run import FREE, Config, build, fingerprint
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.run.jsonl import write_atomically


def default_folder(cfg: Config) -> Path:
    """runs/<model>-<router or dense>-<data>-seed<seed>-<hash of the settings>: equal settings, equal folder."""
    kind = cfg.router.name if cfg.model.moe else "dense"
    return Path("runs") / f"{cfg.model.name}-{kind}-{cfg.data.name}-seed{cfg.seed}-{fingerprint(cfg)}"


def read_config(run: Path) -> Config:
    """The config a run was started with. Raises `BadInput` for a folder that is not a run's."""
    path = run / "config.yaml"
    if not path.is_file():
        runs: list[str] = []
        for folder in (run, run.parent):  # a comparison's folder has its runs inside
            runs = runs or sorted(str(config.parent) for config in folder.glob("*/config.yaml"))
        hint = f"; there are {', '.join(runs)}" if runs else ""
        raise BadInput(f"run={run} is not a run's folder: it has no config.yaml{hint}.")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
    return build(tree)


def create_folder(run: Path, cfg: Config, tokenizer: Tokenizer) -> None:
    """A new run's folder, with its resolved config and its tokenizer: whole, or not at all. Raises `BadInput` when it
    cannot be written."""
    temporary = run.with_name(f"{run.name}.tmp-{os.getpid()}")
    try:
        (temporary / "tokenizer").mkdir(parents=True)
        tokenizer.save(temporary / "tokenizer")
        write_atomically(temporary / "config.yaml", yaml.safe_dump(to_dict(cfg), sort_keys=False))
        temporary.rename(run)
    except OSError as error:
        raise BadInput(f"run={run} cannot be created ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_same(old: Config, new: Config) -> None:
    """Refuse to go on with settings other than the run's own: the result would be neither run's."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    for key in dict.fromkeys([*after, *before]):
        if any(key == free or key.startswith(f"{free}.") for free in FREE):
            continue
        if before.get(key) != after.get(key):
            raise BadInput(
                f"{key}={after.get(key)} differs from the run's own {before.get(key)}: leave it out to go on with "
                f"{new.run}, or choose another run."
            )


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
