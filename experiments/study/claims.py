"""Who is at a job, and what became of those that failed: `.claims/<id>/` beside the runs, for all studies there.

A claim is the lock of `moe.run.lock` on that folder, so that one of a dead process is overtaken. A failure stays there
as failure-N.json, and what a worker said of a run as log.txt.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.errors import BadInput, of_the_machine
from moe.run import jsonl, terminal
from moe.run.lock import Lock, holding

FOLDER = ".claims"
PAUSE = 1.0  # seconds between two looks at what others hold
_NAME = re.compile(r"failure-(\d+)\.json")


@dataclass(frozen=True)
class Failure:
    """Why a job failed."""

    sentence: str  # for people
    last: str  # the last line of the error
    traceback: str
    tries: int  # how often it had been tried by then
    host: str = ""
    when: str = ""


def claim_of(runs: Path, job: str) -> Path:
    """The folder of the claims on the job of this id."""
    return runs / FOLDER / job


def make_claims(runs: Path, job: str) -> Path:
    """The same, made if it is not there. Raises `BadInput` where it cannot be."""
    folder = claim_of(runs, job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be created ({error.strerror or error}).") from error
    return folder


@contextlib.contextmanager
def claimed(runs: Path, job: str) -> Iterator[bool]:
    """Whether the job of this id is this process' alone, as long as the context lasts. Raises `BadInput` where a claim
    cannot be written."""
    folder = claim_of(runs, job)
    if holding(folder):
        yield False
        return
    lock = Lock(make_claims(runs, job))
    try:
        lock.__enter__()
    except BadInput:
        if not holding(folder):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def turn(runs: Path, name: str, say: Callable[[str], None] = terminal.say) -> Iterator[None]:
    """Wait until what is called `name` is this process' alone, saying for whom, and keep it as long as the context
    lasts."""
    told = ""
    while True:
        with claimed(runs, name) as ours:
            if ours:
                yield
                return
        holder = holding(claim_of(runs, name)).partition(" (")[0]
        if holder and holder != told:
            say(f"{name}: waiting for {holder}")
            told = holder
        time.sleep(PAUSE)


def failures(runs: Path, job: str) -> list[Failure]:
    """The failures of a job so far, oldest first; one whose file is damaged counts, and says so."""
    numbered = []
    try:
        paths = list(claim_of(runs, job).iterdir())
    except OSError:
        return []
    for path in paths:
        if named := _NAME.fullmatch(path.name):
            try:
                failure = jsonl.record(Failure, json.loads(path.read_text()), str(path))
            except (OSError, ValueError, RecursionError) as error:
                why = f"{path} is damaged: {str(error).splitlines()[0]}"
                failure = Failure(why, why, "", int(named[1]))
            numbered.append((int(named[1]), failure))
    return [failure for _, failure in sorted(numbered, key=lambda pair: pair[0])]


def record_failure(runs: Path, job: str, error: BaseException) -> Failure:
    """Write down why a job failed. Raises `BadInput` where even that cannot be written."""
    refusal = error if isinstance(error, BadInput) else of_the_machine(error)
    text = "".join(traceback.format_exception(error))
    last = next((line for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    tries = len(failures(runs, job)) + 1
    failure = Failure(
        sentence=str(refusal or f"{type(error).__name__}: {str(error).strip() or 'no reason was given'}"),
        last=str(refusal) if refusal else last.strip(),
        traceback=text,
        tries=tries,
        host=socket.gethostname(),
        when=time.strftime("%F %T %z"),
    )
    jsonl.write_json(make_claims(runs, job) / f"failure-{tries}.json", dataclasses.asdict(failure))
    return failure


def forget_failures(runs: Path, job: str) -> None:
    """Have a job tried as if it had never failed; what is known of its failures stays in `failed-before`."""
    folder = claim_of(runs, job)
    for path in folder.glob("failure-*.json"):
        kept = folder / "failed-before"
        kept.mkdir(exist_ok=True)
        shutil.move(path, kept / path.name)
