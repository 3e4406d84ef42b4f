"""Claims about a run as a cluster's job: its ranks, its place in the queue, and that it goes on where it was."""

import dataclasses

import pytest

from experiments.study.requeued import Training, contract, executor_of, words_of
from moe.errors import BadInput


@dataclasses.dataclass
class Place:
    job_id: str = "4711"
    num_tasks: int = 16
    global_rank: int = 9
    local_rank: int = 1
    hostnames: tuple[str, ...] = ("first", "second")


def test_a_task_has_the_contract_of_torchrun():
    variables = contract(Place())
    port = int(variables.pop("MASTER_PORT"))
    assert variables == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "first"}
    assert 20000 <= port < 40000
    assert contract(Place(global_rank=0))["MASTER_PORT"] == str(port)  # one port for all tasks of a job
    assert contract(Place(job_id="4712"))["MASTER_PORT"] != str(port)


def test_a_single_task_is_no_rank():
    assert contract(Place(num_tasks=1)) == {}


def test_the_words_have_a_folder_and_go_on_with_it():
    assert words_of("model=cpu-nano run='runs/a b'") == ["model=cpu-nano", "run=runs/a b", "resume=true"]
    assert words_of("run=x resume=true") == ["run=x", "resume=true"]
    with pytest.raises(BadInput, match=r"command='model=cpu-nano' needs run=FOLDER"):
        words_of("model=cpu-nano")


def test_what_is_queued_again_is_the_same():
    training = Training(["run=x"])
    assert training.checkpoint().function is training


def test_a_cluster_that_is_not_here_is_a_sentence(tmp_path):
    with pytest.raises(BadInput, match="executor=slurm cannot be had here"):
        executor_of("slurm", str(tmp_path))
