"""Command lines that a person can paste: quoted for the shell, and inside for Hydra's grammar."""

import re
import shlex
from typing import Any

# What Hydra takes for text as it stands; a word without a slash must not be one of its numbers or constants either.
PLAIN = re.compile(r"(?!(?:null|true|false|inf|nan)\Z)[A-Za-z_][A-Za-z0-9_.-]*|[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*", re.I)


def quoted(value: str) -> str:
    """Any text as Hydra's quoted value, which is that text and nothing else."""
    # A backslash is special before an interpolation (OmegaConf), and in quotes before a quote or the end (Hydra).
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda end: end[1] * 2 + (r"\'" if end[2] else ""), value)
    return f"'{value}'"


def override(key: str, value: Any) -> str:
    """`key=value` for Hydra. A text is quoted only where its grammar would read it as something else."""
    if isinstance(value, str):
        return f"{key}={value if PLAIN.fullmatch(value) else quoted(value)}"
    return f"{key}={shown(value)}"


def shown(value: Any) -> str:
    """A value as a command line takes it; of text, only the empty one is quoted."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)


def command_line(name: str, *words: str) -> str:
    """What to type to run `experiments.<name>` with these words."""
    return shlex.join(["python", "-m", f"experiments.{name}", *words])
