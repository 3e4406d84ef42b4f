"""What a number needs beside it: device, driver, versions, the code that ran and the command that started it."""

import contextlib
import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from moe.run import machine
from moe.run.command_line import command_line

ROOT = Path(__file__).resolve().parent.parent.parent


def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a number needs beside it: device, driver, versions, the code that ran and the command that started it.

    commit: of a tree that is a copy without its .git; whether such a tree is dirty is unknown (None), and `code`, a
    hash of what was timed, says which one it was."""
    state = machine.git_state()
    return {
        "device": machine.device_name(device),
        "driver": driver(device),
        "versions": versions(),
        "commit": state.commit or commit,
        "dirty": state.dirty,
        "code": code(),
        "command": command(),
    }


def versions() -> dict[str, str]:
    """As `machine.versions`, and Triton's where it is installed."""
    version_of = machine.versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version_of["triton"] = importlib.metadata.version("triton")
    return version_of


def driver(device: torch.device) -> str | None:
    """The version of a GPU's driver, None where there is none or it does not say."""
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def command() -> str:
    """What started this process, as a person would type it."""
    return command_line(Path(sys.argv[0]).stem, *sys.argv[1:])


def code() -> str:
    """Twelve hex digits of the kernels, their tiles and the model: equal digits, equal code under test."""
    digest = hashlib.sha256()
    for path in timed_files(ROOT):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def timed_files(root: Path) -> list[Path]:
    """What a measurement depends on, at every depth: the sources of the kernels and of the library, and the tiles."""
    return sorted(
        [*(root / "kernels").rglob("*.py"), *(root / "kernels").glob("*.jsonl"), *(root / "moe").rglob("*.py")]
    )
