"""Whose code a stored run may have imported. A run's folder may come from anybody, and its config.yaml may name a class
of one's own (`router.name=module:Class`), which is code: it is imported only when a person says so, and from nowhere
inside that folder.
"""

import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from moe.errors import BadInput


def check_router(run: Path, name: str, trust: bool | str) -> None:
    """Refuse the router called `name` in the config of the run in folder `run`, unless it is the library's own, or one
    that is trusted and lies elsewhere. `trust`: whatever class it names (True), or the one of this name. Imports
    nothing. Raises `BadInput` that says what would be imported."""
    module, colon, _ = name.partition(":")
    if not colon:
        return
    files = list(_files_of(module))
    for file in files:
        if _inside(file, run):
            raise BadInput(
                f"{run / 'config.yaml'} has router.name={name}, and {file} lies in the run's own folder, from which "
                "nothing is imported: keep the module elsewhere on the path, and say with trust=true that you know it."
            )
    if trust is not True and trust != name:
        place = files[-1] if files else "which is not found here"
        raise BadInput(
            f"{run / 'config.yaml'} has router.name={name}, a class of one's own, and reading this run would import "
            f"{module} ({place}): if you know that code, say so with trust=true on this command line, or with "
            f"router.name={name} where a command takes it."
        )


def _files_of(module: str) -> Iterator[Path]:
    """The files that importing `module` would run, of its packages and its own, as far as they are found without
    running any."""
    parts, path = module.split("."), None
    if not all(part.isidentifier() for part in parts):
        return
    for depth, part in enumerate(parts):
        if loaded := getattr(sys.modules.get(".".join(parts[: depth + 1])), "__file__", None):
            yield Path(loaded)
        # Below the first, where its package says: a finder would ask for the package itself, which is not imported.
        finders = sys.meta_path if path is None else [PathFinder]
        specs = (finder.find_spec(part, path) for finder in finders if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return
        if spec.has_location and spec.origin:
            yield Path(spec.origin)
        if spec.submodule_search_locations is None:
            return
        path = list(spec.submodule_search_locations)


def _inside(file: Path, run: Path) -> bool:
    """Whether a file, or a folder on the way to it, lies in the run's folder once links are followed."""
    real_run, file = Path(os.path.realpath(run)), Path(os.path.abspath(file))
    return any(Path(os.path.realpath(place)).is_relative_to(real_run) for place in (file, *file.parents))
