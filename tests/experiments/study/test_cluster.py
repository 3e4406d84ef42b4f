"""Claims about workers that a cluster starts, by submitit's local executor."""

import sys

import pytest

from experiments.study import cluster
from experiments.study.compose import SlurmConfig
from experiments.study.manifest import read_study
from experiments.study.states import states_of
from moe.errors import BadInput
from tests.experiments.study.small_studies import fates, job, work, write


def test_the_tasks_of_an_array_do_a_studys_work_between_them(tmp_path, corpus, capsys):
    jobs = [job(corpus, seed=seed) for seed in range(2)]
    study = write(tmp_path / "runs" / "study", jobs)
    assert cluster.submit(tmp_path / "runs" / "study", study, 2, SlurmConfig("local", time=5)) == 0
    assert [state.word for state in states_of(tmp_path / "runs" / "study", study)] == ["done"] * 2
    alone = write(tmp_path / "alone" / "study", jobs)
    work(tmp_path / "alone" / "study")
    assert fates(tmp_path / "runs" / "study", study) == fates(tmp_path / "alone" / "study", alone)
    out = capsys.readouterr().out
    assert "2 workers, local jobs " in out
    assert "How far it is: python -m experiments.status run=" in out
    assert out.endswith("is finished: all 2 jobs are done\n")
    assert read_study(tmp_path / "runs" / "study") == study  # beside what submitit writes


class Recorded:
    """In place of submitit's executor: keeps what it is told."""

    def __init__(self, folder, cluster):
        self.told = {"folder": folder, "cluster": cluster}
        self.tasks = []

    def update_parameters(self, **given):
        self.told |= given

    def batch(self):
        return self

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def submit(self, *call):
        self.tasks.append(call)
        return type("Task", (), {"job_id": f"7_{len(self.tasks)}"})


def test_the_settings_of_slurm_reach_it_and_nobody_waits(tmp_path, corpus, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("submitit.AutoExecutor", lambda **given: made.append(Recorded(**given)) or made[-1])
    study = write(tmp_path / "study", [job(corpus)])
    slurm = SlurmConfig("slurm", "gpu", time=90, gpus=2, cpus=4, array_parallelism=8)
    assert cluster.submit(tmp_path / "study", study, 3, slurm) == 0
    assert made[0].told == {
        "folder": str(tmp_path / "study" / "slurm"),
        "cluster": "slurm",
        "name": "small",
        "timeout_min": 90,
        "gpus_per_node": 2,
        "cpus_per_task": 4,
        "slurm_array_parallelism": 8,
        "slurm_partition": "gpu",
    }
    assert made[0].tasks == [(cluster.worker_task, str(tmp_path / "study"))] * 3
    assert "3 workers, slurm jobs 7_1, 7_2, 7_3" in capsys.readouterr().out


def test_where_there_is_no_cluster_or_no_submitit_a_sentence_says_so(tmp_path, corpus, monkeypatch):
    study = write(tmp_path / "study", [job(corpus)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match=r"^slurm\.executor=slurm cannot take the study: .*srun"):
        cluster.submit(tmp_path / "study", study, 1, SlurmConfig("slurm"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(BadInput, match=r"needs the package submitit, .*: pip install 'moe-switchyard\[cluster\]'\."):
        cluster.submit(tmp_path / "study", study, 1, SlurmConfig("local"))
