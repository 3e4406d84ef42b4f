"""Claims about SIGKILL at random times of a training: the run is gone on with, and comes to the end of one that nothing
happened to. Those with many kills are marked `nightly` and left to `make nightly`."""

import contextlib
import itertools
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.suites.survival import SETTINGS
from tests.small_runs import fate

LONGEST = 280.0  # seconds that a training may take


def by_command(command: list[str]) -> Callable[[list[str], Path], Any]:
    """(words, log) -> the id of the process that trains with them."""

    def launch(words: list[str], log: Path) -> int:
        with log.open("w") as out:
            return subprocess.Popen([*command, *words], stdout=out, stderr=out, start_new_session=True).pid

    return launch


def forked(words: list[str], log: Path) -> int:
    """The same from a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.train"])
    process = context.Process(target=_train, args=(words, log))
    process.start()
    return process.pid


def _train(words: list[str], log: Path) -> None:
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    sys.argv = ["experiments.train", *words]
    runpy.run_module("experiments.train", run_name="__main__")


LAUNCHES = {
    "forked": forked,
    "one process": by_command([sys.executable, "-m", "experiments.train"]),
    "two ranks": by_command(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "experiments.train"),
        ]
    ),
}


def ended(pid: int, seconds: float) -> bool:
    """Whether a process comes to its end in so many seconds; one that does not is killed, with all that it started."""
    process = psutil.Process(pid)
    try:
        process.wait(seconds)
        return True
    except psutil.TimeoutExpired:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            for alive in (process, *process.children(recursive=True)):
                alive.kill()
        process.wait()
        return False


def train_through_kills(launch: Callable[[list[str], Path], int], folder: Path, n_kills: int) -> tuple[int, list[int]]:
    """Train again and again until so many kills are spent, each at a random time of a launch; how many trainings came
    to the end of the first, that nothing happens to, and how many checkpoints each kill found."""
    (folder / "text.txt").write_text("".join(f"Line {i} of a text.\n\n" for i in range(2000)))
    clock, steps, same = random.Random(0), [], 0
    expected, whole = None, LONGEST
    for number in itertools.count():
        place = folder / str(number)
        place.mkdir()
        words = [f"data.path={folder / 'text.txt'}", f"data.cache={place / 'cache'}", f"run={place / 'run'}", *SETTINGS]
        # Until it ends by itself: the first time without a kill, and without one when all are spent.
        for launched in itertools.count():
            spent = expected is None or len(steps) == n_kills
            began = time.monotonic()
            if ended(launch(words, place / "log"), LONGEST if spent else clock.uniform(0, whole)):
                whole = min(whole, time.monotonic() - began) if not launched else whole
                break
            assert not spent, f"it does not end:\n{(place / 'log').read_text()}"
            steps.append(len(list((place / "run" / "checkpoints").glob("step-????????"))))
        # The same end, to the bit.
        assert (place / "run" / "summary.json").exists(), (place / "log").read_text()
        if expected is None:
            expected = fate(place / "run")
        else:
            assert fate(place / "run") == expected, f"after {len(steps)} kills"
            same += 1
            if spent:
                break
    return same, steps


def test_a_training_killed_at_random_times_comes_to_the_uninterrupted_end(tmp_path):
    same, kills = train_through_kills(forked, tmp_path, 5)
    assert same >= 1
    assert len(kills) == 5


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_a_hundred_kills_lose_no_training(launch, tmp_path):
    n_kills = int(os.environ.get("KILLS", "100"))
    same, kills = train_through_kills(launch, tmp_path, n_kills)
    print(f"{len(kills)} kills, {same} trainings that came to the same end; checkpoints at each kill: {kills}")
    assert len(kills) == n_kills
