"""Small studies: arms of the runs of tests/small_runs.py, planned without Hydra, a second of training per job."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from experiments.study import worker
from experiments.study.compose import job_of
from experiments.study.manifest import Job, Study, run_of, write_study
from moe.run import machine
from tests.small_runs import fate, settings

FASTER: dict[str, Any] = {"model.vocab_size": 257, "train.eval_every": 0, "train.steps": 4, "checkpoint.every": 2}


def job(corpus: Path, arm: str = "softmax", seed: int = 0, **changes: Any) -> Job:
    """A job of a tiny run; `changes` are settings with __ for the dots."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    cfg = settings(corpus, "", FASTER | {"seed": seed, "router.name": arm} | dotted)
    return job_of(arm, [f"router={arm}"], cfg)


def study_of(jobs: list[Job], **about: Any) -> Study:
    """A plan of these jobs."""
    told = {"name": "small", "command": "", "commit": None, "base": jobs[0].arm, "margin": 0.01} | about
    return Study(jobs=jobs, **told)


def write(folder: Path, jobs: list[Job], **about: Any) -> Study:
    """A plan of these jobs, in `folder`."""
    study = study_of(jobs, **about)
    write_study(folder, study)
    return study


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without what only costs time here: no power fails, nobody reads the peak memory, and nobody is waited for."""
    with mock.patch.object(machine, "reset_peak_memory"), mock.patch("os.fsync"), mock.patch("time.sleep"):
        yield


def work(folder: Path, patient: bool = True) -> list[worker.Event]:
    """What a worker in this process tells of the study in `folder`."""
    events: list[worker.Event] = []
    with quick():
        worker.work(folder, events.append, patient)
    return events


class InThisProcess:
    """In place of `Pool`: one worker, here, which counts the jobs it is given."""

    given: ClassVar[list[int]] = []

    def __init__(self, folder: Path, study: Study, workers: int) -> None:
        self.folder = folder
        self.given.append(len(study.jobs))

    def run(self) -> int:
        """Train all of it."""
        work(self.folder)
        return 0


def fates(folder: Path, study: Study) -> dict[str, Any]:
    """What every run of a study came to, bit by bit, timings left out."""
    return {each.id: fate(run_of(folder, each)) for each in study.jobs}
