"""A worker: claim a job that is neither done nor anybody's, train it, record what failed, and on to the next.

    python -m experiments.study.worker runs/STUDY

is what `experiments.sweep` starts; any number of them, on any machines that share the folder, do one study's work. What
a run says goes to `.claims/<id>/log.txt`; the worker's own standard output has a JSON line per event.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.study.claims import PAUSE, Failure, claim_of, claimed, failures, record_failure
from experiments.study.manifest import Job, config_of, finished, read_study, run_of, runs_of
from experiments.study.search import ask, is_wanting
from moe.errors import BadInput, of_the_machine
from moe.run import jsonl, terminal
from moe.run.lock import holding
from moe.train.loop import train

REFUSED = 2  # exit status


@dataclasses.dataclass(frozen=True)
class Event:
    """What a worker tells of a job."""

    what: str  # begun | done | failed
    job: str  # its id
    loss: float | None = None  # of the validation, of a job that is done
    seconds: float | None = None  # of training, all sessions together
    error: str = ""
    tries: int = 0


Tell = Callable[[Event], object]


def work(folder: Path, tell: Tell, patient: bool = True) -> None:
    """Work through the study in `folder` until every job is done or has failed as often as it may; if not `patient`,
    only until all that are left are in other hands. A job that fails never ends it. Raises `BadInput` where nothing
    can be written, and `SystemExit` after a signal, with what was trained saved."""
    study = read_study(folder)
    runs, left = runs_of(folder), list(study.jobs)
    while left or is_wanting(study):
        trained = False
        for job in list(left):
            if is_settled(folder, job, study.retries):
                left.remove(job)
                continue
            with claimed(runs, job.id) as ours:
                # Another may have been quicker between the look and the claim, or trains the run without one.
                if ours and not holding(run_of(folder, job)) and not is_settled(folder, job, study.retries):
                    attempt(folder, job, tell)
                    trained = True
        if trained:
            continue
        if is_wanting(study):  # nothing is free: a trial more, or those that others have asked for
            n_known = len(study.jobs)
            study = ask(folder, study)
            left += study.jobs[n_known:]
        elif left:
            if not patient:
                return
            time.sleep(PAUSE)


def is_settled(folder: Path, job: Job, retries: int) -> bool:
    """Whether nothing is to be done for a job: it is finished, or has failed as often as it may."""
    try:
        if finished(run_of(folder, job), config_of(job)):
            return True
    except BadInput:  # what is wrong with it is found, and recorded, by trying
        pass
    return len(failures(runs_of(folder), job.id)) > retries


def attempt(folder: Path, job: Job, tell: Tell) -> None:
    """Train a job from its last checkpoint on, and tell what became of it."""
    runs = runs_of(folder)
    cfg = dataclasses.replace(config_of(job), run=str(run_of(folder, job)), resume=True)
    tell(Event("begun", job.id))
    try:
        with logged(claim_of(runs, job.id) / "log.txt"):
            summary = train(cfg, say=terminal.say)
            finished(run_of(folder, job), cfg)
    except Exception as error:
        failure: Failure = record_failure(runs, job.id, error)
        tell(Event("failed", job.id, error=failure.sentence, tries=failure.tries))
        return
    tell(Event("done", job.id, summary.val.loss, summary.seconds))


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Have all that is printed inside appended to the file at `path`; a disk that is full loses it, and no more."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error
    log = terminal.outlet(descriptor)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        log.flush()
        os.close(descriptor)


def end_with_parent() -> None:
    """Stop, with the step saved, when the process that started this one is gone: its end of standard input closes."""

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def main(arguments: list[str]) -> int:
    """Work on the study in the folder that is named first; `--tied` ends with the process at standard input, and
    `--alone` waits for no job that others are at. Returns the exit status."""
    terminal.begin()
    if "--tied" in arguments:
        end_with_parent()
    tell = lambda event: print(jsonl.to_text(dataclasses.asdict(event)), flush=True)
    try:
        work(Path(arguments[0]), tell, patient="--alone" not in arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        refusal = error if isinstance(error, BadInput) else of_the_machine(error)
        if refusal is None:
            raise
        print(f"error: {terminal.printable(str(refusal))}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
