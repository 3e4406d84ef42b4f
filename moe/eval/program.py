"""run.c from Python: compiled, and asked how probable it finds a text.

The folder is one that `moe.convert.export_c.save` wrote: model.bin and run.c.
"""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moe.errors import BadInput

FLAGS = ("-O3", "-std=c99")  # as docs/two-files.md has them


def compile_program(folder: Path, *flags: str, name: str = "run") -> Path:
    """`folder`/`name` of `folder`/run.c, with the system's C compiler and `flags` more, such as -fopenmp. Raises
    `BadInput` where there is no compiler, or it cannot."""
    compiler, program = shutil.which("cc"), folder / name
    if not compiler:
        raise BadInput("there is no C compiler: a program named cc on the path is needed.")
    command = [compiler, *FLAGS, *flags, str(folder / "run.c"), "-o", str(program), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"{compiler} cannot compile {folder / 'run.c'} ({done.stderr.strip()[:200]}).")
    return program


def score(program: Path, folder: Path, windows_WS1: Iterable[np.ndarray]) -> np.ndarray:
    """-log p of every token of the windows after the first, (W, S) float64 in nats, as the model in `folder` has it.
    Raises `BadInput` for a model that the program refuses."""
    lines = "".join(" ".join(map(str, window.tolist())) + "\n" for window in windows_WS1)
    command = [str(program), str(folder / "model.bin"), "--score", "--ids"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(done.stderr.strip().removeprefix("error: "))
    return np.array([line.split() for line in done.stdout.splitlines()], float)
