"""Workers as the tasks of a cluster's job array, through submitit; its local executor does the same on this machine."""

from pathlib import Path
from typing import Any

from experiments.study import worker
from experiments.study.compose import SlurmConfig
from experiments.study.manifest import Study
from experiments.study.pool import conclude
from moe.errors import BadInput
from moe.run import terminal
from moe.run.command_line import command_line, override


def submit(folder: Path, study: Study, workers: int, cfg: SlurmConfig) -> int:
    """Hand `workers` workers to the cluster. Local ones are waited for; on a cluster the command ends here, and
    whoever is last writes the last run. Returns the exit status. Raises `BadInput` without submitit or a cluster."""
    try:
        import submitit
    except ImportError:
        raise BadInput(
            f"slurm.executor={cfg.executor} needs the package submitit, which is not installed: "
            "pip install 'moe-switchyard[cluster]'."
        ) from None

    # One array of equal tasks: each claims its jobs from the folder, so that none needs to be told which.
    try:
        executor: Any = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cfg.executor)
        executor.update_parameters(
            name=study.name,
            timeout_min=cfg.time,
            gpus_per_node=cfg.gpus,
            cpus_per_task=cfg.cpus,
            slurm_array_parallelism=cfg.array_parallelism,
            **({"slurm_partition": cfg.partition} if cfg.partition else {}),
        )
        with executor.batch():
            tasks = [executor.submit(worker_task, str(folder)) for _ in range(workers)]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"slurm.executor={cfg.executor} cannot take the study: {words[0].rstrip('.')}.") from None
    terminal.say(f"study: {folder}  {workers} workers, {cfg.executor} jobs {', '.join(task.job_id for task in tasks)}")
    terminal.say(f"How far it is: {command_line('status', override('run', str(folder)))}")
    if cfg.executor != "local":
        return 0
    for task in tasks:
        task.wait()
    return conclude(folder, study)


def worker_task(folder: str) -> None:
    """What a task of the array does. It waits for no job that others are at, so that no allocation idles."""
    if status := worker.main([folder, "--alone"]):
        raise SystemExit(status)
