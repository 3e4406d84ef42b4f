"""Claims about how ranks meet, agree and part."""

import os
import signal

import pytest

from moe.errors import BadInput
from moe.parallel import launch
from moe.parallel.collectives import rank
from tests.ranks import run_ranks


def test_alone_nothing_is_asked_of_anybody():
    assert not launch.started_by_many()
    launch.join("cpu", 1.0)
    assert launch.shared("mine") == ["mine"]
    assert launch.from_first(3) == 3
    assert launch.largest(2) == 2
    assert launch.any_rank(True)
    assert not launch.any_rank(False)
    assert launch.first_then_others(lambda: "done") == "done"
    assert launch.first_then_tell(lambda: 1) == 1
    assert launch.is_first_to_tell()
    assert launch.of_the_ranks(RuntimeError("timed out")) is None


def _agreement():
    number = rank()
    order = []
    value = launch.first_then_others(lambda: order.append(number) or number)
    return (
        launch.shared(f"rank {number}"),
        launch.from_first(10 + number),
        launch.largest(signal.SIGTERM if number == 1 else 0),
        launch.any_rank(number == 1),
        launch.any_rank(False),
        value,
        launch.first_then_tell(lambda: os.getpid()),
    )


def test_every_rank_learns_the_same():
    ours, theirs = run_ranks(2, _agreement)
    assert ours[0] == theirs[0] == ["rank 0", "rank 1"]
    assert ours[1:5] == theirs[1:5] == (10, signal.SIGTERM, True, False)
    assert (ours[5], theirs[5]) == (0, 1)  # each has called it
    assert ours[6] == theirs[6] != os.getpid()


def _alike(facts):
    try:
        launch.check_alike(facts[rank()])
    except BadInput as bad:
        return str(bad)


def test_a_rank_that_is_not_like_the_first_is_named_with_what_differs():
    assert run_ranks(2, _alike, [{"torch": "2.13", "seed": 1}] * 2) == [None, None]
    ours, theirs = run_ranks(2, _alike, [{"torch": "2.13", "seed": 1}, {"torch": "2.13", "seed": 2}])
    assert ours == theirs
    assert ours.startswith("rank 1 (process ")
    assert "has seed 2, and rank 0 1: all ranks must have the same" in ours


CONTRACT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_contract_that_is_not_whole_is_named(name, monkeypatch):
    for key, value in CONTRACT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(name)
    with pytest.raises(BadInput, match=name):
        launch.join("cpu", 1.0)


def test_a_port_that_cannot_be_had_is_named(monkeypatch):
    for key, value in (CONTRACT | {"MASTER_ADDR": "203.0.113.1"}).items():  # an address that is nobody's here
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(launch, "MEET", launch.timedelta(seconds=1))
    with pytest.raises(BadInput, match=r"rank 0 of 2 cannot meet the others at MASTER_ADDR=203.0.113.1 MASTER_PORT=1"):
        launch.join("cpu", 1.0)


def test_gpus_that_are_not_here_are_refused_before_anybody_is_waited_for(monkeypatch):
    for key, value in CONTRACT.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        BadInput, match=r"train.device=cuda with 2 ranks needs NCCL and a GPU for each, and rank 0 has 0"
    ):
        launch.join("cuda", 1.0)


def _devices(names):
    return [launch.device_of(name) for name in names]


def test_every_rank_has_a_gpu_of_its_own_also_where_rank_0s_is_named():
    names = ["cpu", "auto", "cuda", "cuda:0"]
    assert run_ranks(2, _devices, names) == [["cpu", "auto", f"cuda:{i}", f"cuda:{i}"] for i in (0, 1)]
    assert _devices(names) == names
