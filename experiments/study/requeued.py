"""One training run as a cluster's job, on as many machines as it takes, through submitit; its local executor does the
same on this machine.

A task of the job is a rank. It starts the training as torchrun would, and when the cluster says that the time is up
(submitit's signal) has it save and end, and the job put in the queue again, where it goes on.
"""

import os
import shlex
import signal
import subprocess
import sys
from typing import Any

from moe.errors import BadInput


class Training:
    """What every task of the job calls: `experiments.train` with these words."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __call__(self) -> int:
        """Train until the end, or until the time is up. Raises `RuntimeError` with the status of a training that
        failed, whose sentence stands in the job's log."""
        import submitit  # here, because not everybody has it

        place = submitit.JobEnvironment()
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *self.words], env=os.environ | contract(place)
        )
        queue_again, asked = signal.getsignal(signal.SIGUSR2), []

        def save(number: int, frame: Any) -> None:
            asked.append(number)
            process.send_signal(signal.SIGTERM)

        signal.signal(signal.SIGUSR2, save)
        status = process.wait()
        signal.signal(signal.SIGUSR2, queue_again)
        if asked and callable(queue_again):
            queue_again(signal.SIGUSR2, None)  # of rank 0: does not return
        elif status:
            raise RuntimeError(f"the training ended with status {status}")
        return status

    def checkpoint(self) -> Any:
        """What is put in the queue again: the same, as the run's folder says where it is."""
        import submitit  # here, as above

        return submitit.helpers.DelayedSubmission(self)


def contract(place: Any) -> dict[str, str]:
    """torchrun's variables, of a task that submitit describes; none where it is the only one."""
    if place.num_tasks == 1:
        return {}
    port = 20000 + sum(map(ord, str(place.job_id))) * 7919 % 20000  # the same for all tasks of a job, and few others
    return {
        "RANK": str(place.global_rank),
        "WORLD_SIZE": str(place.num_tasks),
        "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": str(place.hostnames[0]),
        "MASTER_PORT": str(port),
    }


def executor_of(name: str, folder: str) -> Any:
    """submitit's executor, slurm or local, its logs in `folder`. Raises `BadInput` without submitit or a cluster."""
    try:
        import submitit  # here, as above
    except ImportError:
        raise BadInput(
            f"executor={name} needs the package submitit, which is not installed: "
            "pip install 'moe-switchyard[cluster]'."
        ) from None
    try:
        return submitit.AutoExecutor(folder=folder, cluster=name)
    except RuntimeError as error:
        raise BadInput(f"executor={name} cannot be had here: {str(error).splitlines()[0].rstrip('.')}.") from None


def words_of(command: str) -> list[str]:
    """The words of a command of `experiments.train`, each run of which goes on where the one before ended. Raises
    `BadInput` where it has no run= to go on with."""
    words = shlex.split(command)
    if not any(word.startswith("run=") for word in words):
        raise BadInput(f"command={command!r} needs run=FOLDER, with which the job goes on when it is queued again.")
    return [*words, *([] if "resume=true" in words else ["resume=true"])]
