"""Measurements as rows: each is written to a .jsonl file the moment it is made, and none is made twice.

A `Case` has a key, which says what is measured, and a function that measures it. `run` goes through cases until the
time is used up. Whatever ends a run early (a signal, a full disk, a crash of the driver) costs the row in the making
alone: run again with the same file, and rows of the same key, commit and code are kept.

Every row has a status: measured · failed (it raised: `error`) · wrong (its result is) · absent (a package, a file or a
device that is not here) · left out (no time or memory for it). Measured rows are done, and what the process died of
twice; all others are made again. The last row of a key counts.
"""

import contextlib
import gc
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.suites import timing
from moe.errors import BadInput
from moe.run.jsonl import to_text, write_atomically

SAME = ("commit", "code", "device")  # what a kept row has in common with a new one, beside its key
FOLDERS = re.compile(r"""(?<![\w.=])(?:/[^/\s:'"]+)+/""")  # of an absolute path
DEATHS = 2  # a case at which the process died this often is not tried again


class Wrong(Exception):
    """A result that is not what it should be: it is not timed."""


class Absent(Exception):
    """Something that a measurement needs is not here."""


class LeftOut(Exception):
    """A measurement that does not fit, and by how much."""


class DeviceLost(RuntimeError):
    """The device answers no more in this process: a new one has to go on."""


class Case(NamedTuple):
    """One row to be: what it is of, and how to get it."""

    key: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


def absent(key: dict[str, Any], why: str) -> Case:
    """A row that says that something is not here."""

    def measure() -> dict[str, Any]:
        raise Absent(why)

    return Case(key, measure)


class Rows:
    """A .jsonl file of rows. `common` (facts of machine and code) is part of each."""

    def __init__(self, path: Path, common: dict[str, Any], resume: bool) -> None:
        self.path, self.common, self.mark = path, common, path.with_suffix(".running")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows: list[dict[str, Any]] = read(path) if resume else []
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error
        self.begun = False
        if resume and self.mark.exists():  # the process before this one died in a case
            with contextlib.suppress(json.JSONDecodeError):
                key = json.loads(self.mark.read_text())
                self.add(key | {"status": "failed", "error": "the process died while measuring this", "died": True})
        self.mark.unlink(missing_ok=True)

    def kept(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row of this key, if it need not be made again."""
        wanted = _plain(key) | {name: self.common[name] for name in SAME if name in self.common}
        mine = [row for row in self.rows if _has(row, wanted)]
        done = [row for row in mine if row["status"] == "measured"]
        if done:
            return done[-1]
        deaths = [row for row in mine if row.get("died")]
        return deaths[-1] if len(deaths) >= DEATHS else None

    def add(self, values: dict[str, Any]) -> dict[str, Any]:
        """Append a row and have it on its way to the disk. JSON has no NaN: a number that is not finite is null."""
        row = json.loads(to_text(_plain(self.common | values)))
        try:
            if not self.begun:  # what was there before is kept whole until there is something to put in its place
                write_atomically(self.path, "".join(to_text(earlier) + "\n" for earlier in self.rows))
                self.begun = True
            with open(self.path, "a") as file:
                file.write(to_text(row) + "\n")
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror or error}).") from error
        self.rows.append(row)
        return row


def run(
    cases: Iterable[Case],
    rows: Rows,
    device: torch.device,
    budget: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure the cases in order and return all their rows. After `budget` seconds no new one is started, and what is
    left has rows that say so. Raises `DeviceLost` when the device does not recover from an error."""
    start, results = time.monotonic(), []
    for case in cases:
        row = rows.kept(case.key)
        if row is None and time.monotonic() - start > budget:
            row = rows.add(case.key | {"status": "left out", "error": f"the {budget:.0f} s for this were used up"})
        elif row is None:
            row = rows.add(case.key | _measured(case, rows, device))
            say(f"{describe(case.key)}: {row['status']} in {row['seconds']:.1f} s")
            if row.get("lost"):
                raise DeviceLost(f"{describe(case.key)}: {row['error']}")
        results.append(row)
    return results


def _measured(case: Case, rows: Rows, device: torch.device) -> dict[str, Any]:
    """What a case gives, or why it gives nothing; its file has a mark beside it meanwhile."""
    rows.mark.write_text(to_text(_plain(case.key)))
    began = time.monotonic()
    values: dict[str, Any]
    try:
        values = {"status": "measured"} | case.measure()
    except Wrong as error:
        values = {"status": "wrong", "error": sentence(error)}
    except Absent as error:
        values = {"status": "absent", "error": sentence(error)}
    except LeftOut as error:
        values = {"status": "left out", "error": sentence(error)}
    except KeyboardInterrupt:
        rows.mark.unlink(missing_ok=True)
        raise
    except Exception as error:  # whatever a peer or a compiler raises is a finding, not the end of the run
        values = {"status": "failed", "error": sentence(error)}
        values |= _recovered(device)
    if device.type == "cuda" and values["status"] != "absent" and not values.get("lost"):
        gc.collect()  # graphs and closures hold tensors in cycles
        torch.cuda.empty_cache()
    rows.mark.unlink(missing_ok=True)
    return values | {"seconds": round(time.monotonic() - began, 3)}


def _recovered(device: torch.device) -> dict[str, Any]:
    """Whether the device still answers after an error; an illegal access is for good."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return {"lost": True, "died": True}
    return {}


def describe(key: dict[str, Any]) -> str:
    """A key for people."""

    def word(name: str, value: Any) -> str:
        if isinstance(value, dict):
            return "/".join(str(int(setting)) for setting in value.values())
        return value if isinstance(value, str) else f"{name}={value}"

    return " ".join(word(name, value) for name, value in key.items())


def sentence(error: BaseException) -> str:
    """An error in a line: its kind unless it is one of ours, its first words, and no folder of this machine."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, Wrong | Absent | LeftOut) else f"{type(error).__name__}: "
    return f"{kind}{FOLDERS.sub('', text)[:300]}"


def newest(rows: Iterable[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The last row of every key, where a key is the values of `names`, in the order in which keys came."""
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        last[json.dumps([row.get(name) for name in names])] = row
    return list(last.values())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a line cut short is left out, and a file that is not there has none."""
    return [json.loads(line) for line in path.read_text().splitlines() if _is_row(line)] if path.exists() else []


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _has(row: dict[str, Any], part: dict[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in part.items())


def _plain(tree: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(tree, default=str))
