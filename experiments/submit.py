"""Hand one training run to a cluster: as many ranks as nodes times tasks, queued again until it is done.

python -m experiments.submit command="model=cpu-nano run=runs/many" executor=local tasks=2
python -m experiments.submit command="model=gpu-1b run=runs/big parallel.ep=8" nodes=4 tasks=8 gpus=8 cpus=96 time=1440

Every task is a rank, with a GPU of its own where there are any. Before the time is up the run saves itself and the job
is put in the queue again, where it goes on from there. Logs are in `folder`. executor=local starts the ranks here, and
waits for them. Studies of many runs go to a cluster by `experiments.sweep slurm.executor=slurm`.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from experiments import cli
from experiments.study import requeued
from moe.config.parse import Between, OneOf, check_values
from moe.errors import BadInput
from moe.run import terminal


@dataclass
class SubmitConfig:
    """Which run, and where."""

    command: str = ""  # what to give experiments.train, in one string
    executor: Annotated[str, OneOf("slurm", "local")] = "slurm"
    nodes: Annotated[int, Between(1, 100_000)] = 1  # machines
    tasks: Annotated[int, Between(1, 1024)] = 1  # ranks on each
    gpus: Annotated[int, Between(0, 1024)] = 0  # of a machine
    cpus: Annotated[int, Between(1, 4096)] = 1  # of a rank
    time: Annotated[int, Between(1, 10_000_000)] = 240  # minutes until it is queued again
    partition: str = ""  # "": the cluster's own default
    folder: str = "runs/jobs"  # of logs


@cli.command("submit", SubmitConfig, verbatim=("command",))
def main(cfg: SubmitConfig) -> None:
    """Submit, and say what was."""
    # What to train, and who takes it.
    check_values(cfg)
    if not cfg.command:
        raise BadInput(
            "command= is needed: what to give experiments.train, like command='model=cpu-nano run=runs/many'."
        )
    words = requeued.words_of(cfg.command)
    executor = requeued.executor_of(cfg.executor, cfg.folder)
    executor.update_parameters(
        name="switchyard",
        timeout_min=cfg.time,
        nodes=cfg.nodes,
        tasks_per_node=cfg.tasks,
        gpus_per_node=cfg.gpus,
        cpus_per_task=cfg.cpus,
        **({"slurm_partition": cfg.partition} if cfg.partition else {}),
    )
    # One job: all its tasks are ranks of the one run.
    try:
        job = executor.submit(requeued.Training(words))
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BadInput(f"executor={cfg.executor} cannot take the job: {reason}.") from None
    terminal.say(f"job {job.job_id}: {cfg.nodes * cfg.tasks} ranks, logs in {cfg.folder}")
    if cfg.executor == "local":
        failures = [
            error for error in map(outcome, range(cfg.nodes * cfg.tasks), [job] * cfg.nodes * cfg.tasks) if error
        ]
        if failures:
            raise BadInput(f"job {job.job_id} failed: {failures[0]}; its logs are in {cfg.folder}.")


def outcome(task: int, job: object) -> str:
    """Wait for a task of a job; what is wrong with it, "" for nothing."""
    try:
        job.task(task).result()  # type: ignore[attr-defined]
    except Exception as error:  # whatever submitit wraps
        lines = str(error).strip().splitlines()
        return next((line for line in reversed(lines) if re.match(r"\w+(Error|Exception): ", line)), lines[-1])
    return ""


if __name__ == "__main__":
    main()
