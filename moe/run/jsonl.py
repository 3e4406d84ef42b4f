"""JSON lines and whole files: what is written is appended line by line, or replaced in one move."""

import json
import math
import os
from pathlib import Path
from typing import Any

from moe.errors import BadInput


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, or leave it as it was."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        lines = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


class Lines:
    """Appends JSON lines; each is on its way to the disk before the next step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, open(path, "a")  # noqa: SIM115 — closed by `close`

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; JSON has no NaN, so a number that is not finite is null. Raises `BadInput` when the disk is
        full."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror or error}).") from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()
