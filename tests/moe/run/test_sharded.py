"""Claims about checkpoints that ranks write together: whole or not at all, on every rank the same answer."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from moe.errors import BadInput
from moe.parallel.collectives import rank
from moe.run import checkpoint, sharded, shards
from moe.run.checkpoint import Snapshot
from tests.moe.run.test_shards import full, on_meshes
from tests.ranks import run_ranks


def snapshot(step: int, layout=(1, 2, 2)) -> Snapshot:
    tensors = on_meshes(full(), *layout)
    model = {name: value for name, value in tensors.items() if "/" not in name}
    optimizer = {name: value for name, value in tensors.items() if "/" in name}
    return Snapshot(step, model, optimizer, {"step": step}, {"cpu": torch.get_rng_state()})


def outcome(work):
    try:
        return work()
    except BadInput as bad:
        return str(bad)


def _saved(root, steps, layout=(1, 2, 2), keep=9):
    return [outcome(lambda step=step: sharded.save(root, snapshot(step, layout), keep=keep)) for step in steps]


@pytest.mark.parametrize("layout", [(1, 2, 2), (2, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_one_process_reads_what_ranks_saved_as_if_it_were_its_own(tmp_path, layout):
    run_ranks(layout[0] * layout[1], _saved, tmp_path, [3], layout)
    path = checkpoint.latest(tmp_path, print)
    assert path == tmp_path / "step-00000003"
    assert checkpoint.is_sharded(path)
    read = checkpoint.load(path)
    assert read.step == 3
    assert read.meta == {"step": 3}
    assert read.rng.keys() == {"cpu"}
    together = read.model | read.optimizer
    assert together.keys() == full().keys()
    assert all(torch.equal(together[name], value) for name, value in full().items())
    assert not any("/" in name for name in read.model)


def test_older_checkpoints_are_deleted_and_a_good_one_is_not_written_again(tmp_path):
    run_ranks(2, _saved, tmp_path, [1, 2, 3], (1, 2, 2), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    before = (tmp_path / "step-00000003" / "meta.json").stat().st_mtime_ns
    run_ranks(2, _saved, tmp_path, [3])
    assert (tmp_path / "step-00000003" / "meta.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["flipped bit", "missing shard", "cut short"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(tmp_path, damage):
    run_ranks(2, _saved, tmp_path, [1, 2])
    shard = tmp_path / "step-00000002" / "shard-00002-model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    if damage == "missing shard":
        shard.unlink()
    else:
        raw[-1] ^= 1
        shard.write_bytes(raw if damage == "flipped bit" else raw[:-1])
    said = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step-00000001"
    assert len(said) == 1
    assert str(shard) in said[0]


Usage = namedtuple("Usage", "free")


def _full_disk(root, who, where):
    """A save while rank `who` has no room: `where` it finds out."""
    usage, write, fsync = shutil.disk_usage, shards.write, os.fsync
    if rank() == who and where == "before":
        shutil.disk_usage = lambda path: Usage(10)
    elif rank() == who:

        def no_room(*arguments):
            raise OSError(28, "No space left on device")

        if where == "writing":
            shards.write = lambda folder, tensors, group: (write(folder, tensors, group), no_room())
        else:
            os.fsync = no_room
    try:
        return _saved(root, [2])[0]
    finally:
        shutil.disk_usage, shards.write, os.fsync = usage, write, fsync


@pytest.mark.parametrize(
    ("who", "where"), [(0, "before"), (0, "writing"), (1, "writing"), (1, "syncing"), (0, "syncing")]
)
def test_a_disk_that_is_full_for_one_rank_is_one_sentence_for_all_and_nothing_is_left(tmp_path, who, where):
    run_ranks(2, _saved, tmp_path, [1])
    ours, theirs = run_ranks(2, _full_disk, tmp_path, who, where)
    assert ours == theirs
    assert (
        "step-00000002: the checkpoint of step 2 cannot be written (No space left on device at rank " + str(who) in ours
    )
    assert "bytes and" in ours
    assert ours.endswith("the last good checkpoint is " + str(tmp_path / "step-00000001") + ".")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.verify(tmp_path / "step-00000001")


def _needed(root, layout):
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: Usage(0)
    try:
        return _saved(root, [2], layout)[0]
    finally:
        shutil.disk_usage = usage


@pytest.mark.parametrize("layout", [(1, 2, 2), (2, 1, 1), (2, 2, 2)])
def test_what_is_needed_is_what_is_written_however_many_ranks_keep_it(tmp_path, layout):
    n = layout[0] * layout[1]
    said = run_ranks(n, _needed, tmp_path, layout)[0]
    bytes_ = sum(value.nbytes for value in full().values()) + torch.get_rng_state().nbytes + len('{\n "step": 2\n}\n')
    needed = int(said.partition("it needs ")[2].partition(" bytes")[0].replace(",", ""))
    assert abs(needed - 2**20 - bytes_) <= 2


def _odd_meta(root):
    try:
        return sharded.save(root, replace(snapshot(1), meta={"t": (1, 2)}), keep=2)
    except ValueError as error:
        return str(error)


def test_a_meta_that_json_would_alter_is_an_error_on_every_rank_before_anything_is_written(tmp_path):
    ours, theirs = run_ranks(2, _odd_meta, tmp_path / "root")
    assert ours == theirs
    assert "JSON would not give it back" in ours
    assert not (tmp_path / "root").exists()


def _warned(root):
    def warn(line):
        raise RuntimeError("nobody listens")

    damaged = root / "step-00000002"
    if rank() == 0:
        damaged.mkdir(parents=True)
    return outcome(lambda: sharded.save(root, snapshot(2), keep=2, warn=warn))


def test_an_error_of_rank_0_alone_reaches_the_others(tmp_path):
    ours, theirs = run_ranks(2, _warned, tmp_path / "root")
    assert ours == theirs
    assert "nobody listens at rank 0" in ours


def _aside(root, n):
    with sharded.Saver() as saver:
        for step in range(1, n + 1):
            saver.save(root, snapshot(step), keep=2)
            assert saver.pending is not None
    return saver.pending


def test_fifty_saves_aside_one_after_another_do_not_hang_and_the_last_is_good(tmp_path):
    assert run_ranks(2, _aside, tmp_path, 50, timeout=120) == [None, None]
    path = checkpoint.latest(tmp_path, print)
    assert path.name == "step-00000050"
    assert all(torch.equal(checkpoint.load(path).model[name], full()[name]) for name in ("bias", "experts.w_EFD"))


def _changed_meanwhile(root):
    with sharded.Saver() as saver:
        taken = snapshot(1)
        saver.save(root, taken, keep=2)
        for value in taken.model.values():
            value.zero_()


def test_what_is_saved_aside_is_of_the_moment_it_was_asked_for(tmp_path):
    run_ranks(2, _changed_meanwhile, tmp_path)
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001").model["bias"], full()["bias"])


def _failing_aside(root):
    def work():
        with sharded.Saver() as saver:
            saver.save(root / "file" / "root", snapshot(1), keep=2)
            saver.wait()

    return outcome(work)


def test_a_save_aside_that_fails_is_told_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    ours, theirs = run_ranks(2, _failing_aside, tmp_path)
    assert ours == theirs
    assert "cannot be written (Not a directory at rank 0)" in ours


def test_one_process_saves_aside_too(tmp_path):
    one = Snapshot(1, {"w": torch.ones(3)}, {}, {}, {"cpu": torch.get_rng_state()})
    with sharded.Saver() as saver:
        saver.save(tmp_path, one, keep=1)
    assert not checkpoint.is_sharded(tmp_path / "step-00000001")
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001").model["w"], torch.ones(3))
