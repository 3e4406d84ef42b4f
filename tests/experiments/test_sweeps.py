"""Claims about what a sweep and its jobs are called, and where they may write."""

from pathlib import Path

import pytest

from experiments.sweeps import LONGEST_NAME, Job, check_places, check_sweep, file_name, job_name, last_part
from moe.config.run import Config
from moe.errors import BadInput


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        (["router=hash", "seed=1"], "hash-seed1"),
        (["router.name=my.routers\\:Nearest"], "Nearest"),
        (["optim.lr=0.001", "model.moe.k=2"], "lr0.001-k2"),
        (["data.path=/data/a b"], "path_data_a_b"),
        ([], "job"),
    ],
)
def test_a_job_is_called_by_its_own_values(swept, name):
    assert job_name(swept) == name


def test_a_setting_is_called_by_its_last_part_and_a_name_by_its_group():
    assert [last_part(key) for key in ("optim.lr", "router.name", "seed", "router")] == [
        "lr",
        "router",
        "seed",
        "router",
    ]


def test_a_files_name_is_short_and_has_nothing_that_a_shell_reads():
    assert file_name("a=${b}/[c]*") == "a_b_c"
    assert len(file_name("x" * 1000)) == LONGEST_NAME


def jobs(*runs: str, resume: bool = False) -> list[Job]:
    return [Job([f"seed={i}"], [f"seed={i}"], Config(seed=i, run=run, resume=resume)) for i, run in enumerate(runs)]


def test_two_ways_to_write_one_place_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"job 1 \(seed=0\) and job 2 \(seed=1\) would both write to "):
        check_places(jobs("a/b", "a/./b"), [Path("a/b"), tmp_path / "a" / "b"])


def test_a_sweep_is_called_by_what_it_sweeps_over_and_other_jobs_give_another_name():
    place = lambda cfg, sweep, job: (cfg, Path("runs", sweep, job, str(cfg.seed)))
    first, second = check_sweep(jobs("", ""), place), check_sweep(jobs("", "", ""), place)
    assert (first.keys, first.n_jobs, second.n_jobs) == (["seed"], 2, 3)
    assert first.name.startswith("sweep-seed-")
    assert first.name != second.name
