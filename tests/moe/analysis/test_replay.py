"""Claims about routing replay: what is written, that taking it again repeats the run, and what is refused."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from moe.analysis.replay import NOT_RECORDED, Replay, check_space, checksums_of, path_of
from moe.errors import BadInput
from moe.routing.contract import UNUSED
from moe.run.jsonl import Lines, read_lines
from moe.train.progress import Watch
from tests.small_runs import STEPS, Killed, fate, settings, train, train_until

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


def _flip(path, position, value=None):
    """Change one byte of a file: to `value`, or by one bit."""
    raw = bytearray(path.read_bytes())
    raw[position] = raw[position] ^ 1 if value is None else value
    path.write_bytes(raw)


def _damage(recorded, folder, how):
    """A copy of the run in `folder` in which something is not as it was written. A step is 256 bytes in each layer."""
    shutil.copytree(recorded, folder)
    path, sums = path_of(folder, 1), checksums_of(folder)
    lines = sums.read_text().splitlines(keepends=True)
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "no array":
            path.write_bytes(b"no array")
        case "another shape":
            np.save(path, np.zeros((STEPS, 64, 2), np.int8))
        case "pickled":
            np.save(path, np.array([[None]], dtype=object), allow_pickle=True)
        case "a flip in range":
            _flip(path, -256 * 5)
        case "a token's experts doubled":
            there = np.load(path)
            there[3, 7] = there[3, 7, 0]
            np.save(path, there)
        case "swapped layers":
            path.rename(folder / "x")
            path_of(folder, 0).rename(path)
            (folder / "x").rename(path_of(folder, 0))
        case "swapped steps":
            np.save(path, np.load(path)[[0, 2, 1, *range(3, STEPS)]])
        case "unfinished":
            sums.write_text("".join(lines[:3]))
        case "begun late":
            sums.write_text("".join(lines[2:]))
        case "cut short in a line":
            sums.write_text(sums.read_text()[:-9])
        case "without checksums":
            sums.unlink()
        case "no line":
            sums.write_text("".join([*lines[:3], "{}\n", *lines[4:]]))
        case "another checksum":
            line = json.loads(lines[2])
            line["blocks"]["0"] = "0" * 16
            sums.write_text("".join([*lines[:2], json.dumps(line) + "\n", *lines[3:]]))
    return folder


NOT_AS_WRITTEN = {
    "missing": "has no routing/experts-1.npy: train it with log.experts=true",
    "truncated": "experts-1.npy is damaged: it has 1,919 bytes, and not 1,920",
    "no array": "experts-1.npy is damaged: ",
    "pickled": "experts-1.npy is damaged: it holds object",
    "another shape": "(7, 64, 2), and not (steps, 128, K) integers",
    "a flip in range": "experts-1.npy is damaged: its experts of step 3 are not those that",
    "a token's experts doubled": "experts-1.npy is damaged: its experts of step 4 are not those that",
    "swapped layers": "experts-0.npy is damaged: its experts of step 1 are not those that",
    "swapped steps": "experts-1.npy is damaged: its experts of step 2 are not those that",
    "unfinished": "has 3 of the train.steps=7",
    "begun late": "has 5 of the train.steps=7",
    "cut short in a line": "has 6 of the train.steps=7",
    "without checksums": "has no routing/checksums.jsonl, so that damage to what it recorded cannot be seen",
    "no line": "checksums.jsonl, line 4 is damaged: it has not the step",
    "another checksum": "experts-0.npy is damaged: its experts of step 3 are not those that",
}


@pytest.mark.parametrize("how", NOT_AS_WRITTEN)
def test_choices_that_are_not_as_they_were_written_are_refused_before_the_run_is_there(how, recorded, corpus, tmp_path):
    source = _damage(recorded, tmp_path / "source", how)
    with pytest.raises(BadInput) as refusal:
        train(settings(corpus, tmp_path / "run", _again(source)))
    assert NOT_AS_WRITTEN[how] in str(refusal.value)
    assert str(source) in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_an_expert_that_the_model_does_not_have_is_refused(recorded, corpus, tmp_path):
    """Of two experts, with checksums of what is there: a run of four was recorded."""
    with pytest.raises(BadInput, match=r"experts-0\.npy names expert 3, and layer 0 has 2 experts, from 0"):
        train(settings(corpus, tmp_path / "run", _again(recorded, **{"model.moe.n_experts": 2})))


def test_choices_that_are_altered_while_they_are_replayed_end_the_replay(recorded, corpus, tmp_path):
    source = _damage(recorded, tmp_path / "source", "nothing")
    replay = Replay(settings(corpus, tmp_path / "run", _again(source)))
    expected = [torch.from_numpy(_choices(source, layer)[4].astype(np.int64)) for layer in (0, 1)]
    assert all(torch.equal(*pair) for pair in zip(replay.step(5, torch.device("cpu")), expected, strict=True))
    _flip(path_of(source, 0), -1)
    with pytest.raises(BadInput, match=r"experts-0\.npy is damaged: its experts of step 7"):
        replay.step(7, torch.device("cpu"))
    path_of(source, 1).write_bytes(path_of(source, 1).read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"experts-1\.npy is damaged: it ends in the block of step 6"):
        replay.step(6, torch.device("cpu"))


@pytest.mark.parametrize("step", [2, 5])
def test_a_kill_between_a_block_and_its_checksum_is_repaired_on_resuming(step, recorded, corpus, tmp_path, monkeypatch):
    """Before the first checkpoint, which is step 3's, and after it."""
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "resume": True})
    write = Lines.write

    def killed(lines, line):
        if lines.path.name == "checksums.jsonl" and line["step"] == step:
            raise Killed
        write(lines, line)

    monkeypatch.setattr(Lines, "write", killed)
    with pytest.raises(Killed):
        train(cfg)
    assert len(read_lines(checksums_of(tmp_path / "run"))) == step - 1
    monkeypatch.undo()
    # killed again as the first step begins: of what came after the checkpoint nothing counts
    train_until(cfg, 4 if step > 3 else 1)
    assert [line["step"] for line in read_lines(checksums_of(tmp_path / "run"))] == ([1, 2, 3] if step > 3 else [])
    train(cfg)
    for layer in (0, 1):
        assert np.array_equal(_choices(tmp_path / "run", layer), _choices(recorded, layer))
    assert checksums_of(tmp_path / "run").read_bytes() == checksums_of(recorded).read_bytes()


def test_of_a_step_that_is_taken_again_nothing_stays_of_the_first_time(corpus, tmp_path):
    """Killed at 6 with a checkpoint of 3, and again after step 4."""
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "resume": True})
    train_until(cfg, 6)
    assert (_choices(tmp_path / "run")[4] >= 0).all()
    train_until(cfg, 5)
    assert (_choices(tmp_path / "run")[3] >= 0).all()
    assert (_choices(tmp_path / "run")[4:] == NOT_RECORDED).all()


@pytest.mark.parametrize("how", ["missing", "truncated", "a flip", "without checksums"])
def test_a_record_that_was_damaged_before_resuming_is_never_remade_in_silence(how, corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "resume": True})
    train_until(cfg, 5)
    path, sums = path_of(tmp_path / "run", 1), checksums_of(tmp_path / "run")
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "a flip":
            _flip(path, -256 * 5 - 1)  # the last of step 2
        case "without checksums":
            sums.unlink()
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(BadInput, match="until step 3 cannot be made again: restore routing/, or go on with") as refusal:
        train(cfg)
    assert ("experts-0.npy has no checksums" if how == "without checksums" else str(path)) in str(refusal.value)
    assert (path.read_bytes() if path.exists() else None) == before
    cfg.log.experts = False
    train(cfg)


def test_steps_whose_checksums_are_lost_are_said(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"log.experts": True, "resume": True})
    train_until(cfg, 5)
    sums = checksums_of(tmp_path / "run")
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])
    said: list[str] = []
    with mock.patch.object(Watch, "say", lambda watch, line: said.append(line)):
        train(cfg)
    assert f"warning: {sums} lacks 2 of the 3 steps that were taken, the first of them 2" in "\n".join(said)
    with pytest.raises(BadInput, match=r"has 5 of the train\.steps=7"):
        Replay(settings(corpus, "", _again(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "was trained with seed=0, and here it is 1: a replay needs the same batches"),
        ({"train.batch_size": 8}, "was trained with train.batch_size=4"),
        ({"data.val_fraction": 0.2}, "was trained with data.val_fraction=0.15, and here it is 0.2"),
        ({"balance.recorded": "nowhere"}, "balance.recorded=nowhere is not a run's folder"),
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


def test_a_replay_of_the_same_batches_may_tell_their_documents_apart(recorded, corpus, tmp_path):
    Replay(settings(corpus, tmp_path / "run", _again(recorded, **{"data.documents": "separate"})))


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
