"""Claims about routing replay: what is written, that taking it again repeats the run, and what is refused."""

import shutil

import numpy as np
import pytest

from moe.analysis.replay import NOT_RECORDED, check_space, path_of
from moe.errors import BadInput
from moe.routing.contract import UNUSED
from moe.run.jsonl import read_lines
from tests.small_runs import STEPS, fate, settings, train, train_until

OTHER = {"router.name": "sigmoid", "router.selection_bias": True}


@pytest.fixture(scope="module")
def recorded(corpus, tmp_path_factory):
    """The folder of a finished run whose choices were written."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(settings(corpus, folder, {"log.experts": True}))
    return folder


def _again(recorded, **changes):
    return {"balance.force": "recorded", "balance.recorded": str(recorded)} | changes


def _choices(folder, layer=0):
    return np.load(path_of(folder, layer), allow_pickle=False)


def test_every_step_has_every_tokens_experts_and_they_are_what_was_counted(recorded):
    lines = {line["step"]: line["counts"] for line in read_lines(recorded / "routing" / "counts.jsonl")}
    for position, layer in enumerate((0, 1)):
        found = _choices(recorded, layer)
        assert found.shape == (STEPS, 4 * 32, 2)
        assert found.dtype == np.int8
        for step, counts in lines.items():
            assert np.bincount(found[step - 1].flatten(), minlength=4).tolist() == counts[position]


def test_writing_the_choices_changes_nothing_else(recorded, corpus, tmp_path):
    train(settings(corpus, tmp_path / "plain"))
    assert fate(tmp_path / "plain") == fate(recorded)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_that_takes_its_own_choices_again_is_that_run(parts, recorded, corpus, tmp_path):
    """Split into micro-batches it is the same tokens and the same experts, and the balance loss of each part."""
    changes = {"balance.aux": 0.0, "train.accumulate": parts}
    train(settings(corpus, tmp_path / "own", changes | {"log.experts": True}))
    train(settings(corpus, tmp_path / "again", changes | _again(tmp_path / "own")))
    assert fate(tmp_path / "again") == fate(tmp_path / "own")


@pytest.mark.parametrize("overflow", ["residual", "next"])
def test_what_capacity_dropped_is_dropped_again(overflow, corpus, tmp_path):
    own = {"balance.capacity": 0.75, "balance.overflow": overflow, "log.experts": True}
    train(settings(corpus, tmp_path / "own", own))
    train(settings(corpus, tmp_path / "again", _again(tmp_path / "own", **{"log.experts": True})))
    for layer in (0, 1):
        assert np.array_equal(_choices(tmp_path / "again", layer), _choices(tmp_path / "own", layer))
    if overflow == "residual":
        lines = read_lines(tmp_path / "own" / "metrics.jsonl")[1:]
        assert max(each["dropped"] for line in lines for each in line["layers"]) > 0
        assert fate(tmp_path / "again")["model"] == fate(tmp_path / "own")["model"]


def test_another_router_takes_the_recorded_experts_and_learns_its_own_weights(recorded, corpus, tmp_path):
    changes = OTHER | {"log.experts": True, "dispatch": "reference"}
    train(settings(corpus, tmp_path / "run", _again(recorded, **changes)))
    assert np.array_equal(_choices(tmp_path / "run"), _choices(recorded))
    assert fate(tmp_path / "run")["model"] != fate(recorded)["model"]


def test_tokens_that_pass_a_block_by_have_no_expert_there(corpus, tmp_path):
    changes = {"model.moe.depth": 0.5, "log.experts": True}
    train(settings(corpus, tmp_path / "own", changes))
    assert (_choices(tmp_path / "own", 0) >= 0).all()
    assert (_choices(tmp_path / "own", 1) >= 0).mean() == 0.5
    train(settings(corpus, tmp_path / "again", changes | _again(tmp_path / "own")))
    assert fate(tmp_path / "again")["model"] == fate(tmp_path / "own")["model"]


def test_a_killed_run_has_the_choices_of_an_uninterrupted_one_after_resuming(recorded, corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "resume": True})
    train_until(cfg, 6)
    assert (_choices(tmp_path / "run")[5:] == NOT_RECORDED).all()
    train(cfg)
    for layer in (0, 1):
        assert np.array_equal(_choices(tmp_path / "run", layer), _choices(recorded, layer))


@pytest.mark.parametrize("router", [{"name": "relu"}, {"name": "top-p"}, {"name": "threshold", "k_max": 3}], ids=str)
def test_a_router_that_takes_as_many_as_it_likes_is_replayed_too(router, corpus, tmp_path):
    changes = {f"router.{key}": value for key, value in router.items()} | {"train.steps": 3}
    train(settings(corpus, tmp_path / "own", changes | {"log.experts": True}))
    train(settings(corpus, tmp_path / "again", changes | _again(tmp_path / "own")))
    assert (_choices(tmp_path / "own") == UNUSED).any()
    assert fate(tmp_path / "again") == fate(tmp_path / "own")


def test_a_killed_replay_goes_on_with_the_steps_that_are_left(recorded, corpus, tmp_path):
    changes = OTHER | _again(recorded)
    train(settings(corpus, tmp_path / "whole", changes))
    cfg = settings(corpus, tmp_path / "killed", changes | {"resume": True})
    train_until(cfg, 5)
    train(cfg)
    assert fate(tmp_path / "killed") == fate(tmp_path / "whole")


def _damage(recorded, folder, how):
    shutil.copytree(recorded, folder)
    path = path_of(folder, 1)
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "no array":
            path.write_bytes(b"no array")
        case "an expert too many":
            np.save(path, np.full((STEPS, 128, 2), 4, np.int8))
        case "another shape":
            np.save(path, np.zeros((STEPS, 64, 2), np.int8))
        case "unfinished":
            there = np.load(path)
            there[3:] = NOT_RECORDED
            np.save(path, there)
        case "begun late":
            there = np.load(path)
            there[:2] = NOT_RECORDED
            np.save(path, there)
        case "pickled":
            np.save(path, np.array([[None]], dtype=object), allow_pickle=True)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "has no routing/experts-1.npy: train it with log.experts=true"),
        ("truncated", "experts-1.npy is damaged: "),
        ("no array", "experts-1.npy is damaged: "),
        ("pickled", "experts-1.npy is damaged: "),
        ("an expert too many", "names expert 4, and layer 1 has 4 experts, from 0"),
        ("another shape", "(7, 64, 2), and not (steps, 128, K) integers"),
        ("unfinished", "has 3 of the train.steps=7"),
        ("begun late", "has 5 of the train.steps=7"),
    ],
)
def test_choices_that_cannot_be_taken_again_are_refused_before_the_run_is_there(how, words, recorded, corpus, tmp_path):
    source = _damage(recorded, tmp_path / "source", how)
    with pytest.raises(BadInput) as refusal:
        train(settings(corpus, tmp_path / "run", _again(source)))
    assert words in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "was trained with seed=0, and here it is 1: a replay needs the same batches"),
        ({"train.batch_size": 8}, "was trained with train.batch_size=4"),
        ({"data.val_fraction": 0.2}, "was trained with data.val_fraction=0.15, and here it is 0.2"),
        ({"balance.recorded": "nowhere"}, "run=nowhere is not a run's folder"),
        ({"balance.recorded": ""}, "force=recorded and the folder of the recorded run go together"),
        ({"balance.force": "none"}, "force=recorded and the folder of the recorded run go together"),
        ({"balance.tile": 4}, "balance.tile=4 and balance.force=recorded: choose one of them"),
        ({"router.name": "expert-choice"}, "balance.force=recorded has no meaning for router.name=expert-choice"),
        (
            {"model.moe.k": 1, "router.renormalize": False},
            "has 2 choices for every token, and router.name=softmax makes 1",
        ),
        ({"router.name": "relu"}, "has 2 choices for every token, and router.name=relu makes 4"),
    ],
)
def test_a_replay_on_other_batches_or_without_meaning_is_refused(changes, words, recorded, corpus, tmp_path):
    with pytest.raises(BadInput) as refusal:
        train(settings(corpus, tmp_path / "run", _again(recorded, **changes)))
    assert words in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_dense_run_has_no_choices_to_write(corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", {"model.moe": None, "log.experts": True, "train.steps": 2}))
    assert not list((tmp_path / "run" / "routing").glob("experts-*"))


@pytest.mark.parametrize("changes", [{"router.name": "expert-choice"}, {"balance.tile": 4}], ids=str)
def test_ragged_choices_are_not_written(changes, corpus, tmp_path):
    with pytest.raises(BadInput, match=r"log.experts=true needs as many choices for every token"):
        settings(corpus, tmp_path / "run", {"log.experts": True} | changes)


def test_choices_that_have_no_room_on_the_disk_are_refused_before_there_is_a_run(corpus, tmp_path):
    """10^12 steps of 128 tokens with K = 2 experts, a byte each, in two layers."""
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "train.steps": 10**12})
    with pytest.raises(BadInput, match=r"^log\.experts=true writes 512,000,000,000,000 bytes .* are free: lower"):
        train(cfg)
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_the_disk_already_needs_no_room(recorded, corpus, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, 0))
    check_space(recorded, settings(corpus, recorded, {"log.experts": True}))
