"""What a checkpoint promises in ordinary use: everything comes back as it was, and the right ones are kept."""

import dataclasses
import json
import os
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import BadInput
from moe.run import checkpoint
from moe.run.checkpoint import Snapshot
from moe.run.streamed import Tensors
from moe.train import state as state_module
from tests.small_runs import left_by_others


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        step=step,
        model={"w": torch.randn(8, 4, generator=generator), "half": torch.randn(5, generator=generator).bfloat16()},
        optimizer={"exp_avg/w": torch.randn(8, 4, generator=generator), "step/w": torch.tensor(float(step))},
        meta={"config": {"seed": 0, "name": "naïve"}, "loader": {"epoch": 0, "position": step}, "scores": [1.5, None]},
        rng={"cpu": generator.get_state()},
    )


def assert_same_bits(a: Snapshot, b: Snapshot) -> None:
    assert (a.step, a.meta) == (b.step, b.meta)
    for ours, theirs in ((a.model, b.model), (a.optimizer, b.optimizer), (a.rng, b.rng)):
        assert set(ours) == set(theirs)
        for name, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, theirs[name])]
            assert torch.equal(*bits), name


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


def flip_a_bit(file: Path, bit: int = 3) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1 - bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def no_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def test_a_snapshot_comes_back_bit_for_bit(tmp_path):
    saved = snapshot(123)
    saved.model |= {
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "nan payload": torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "float64": torch.tensor([0.1], dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(-7),
        "bf16 scalar": torch.tensor(0.1, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(6, 5).t(),
        "strided": torch.arange(20.0)[::3],
        "needs grad": torch.nn.Parameter(torch.randn(3)),
    }
    saved.optimizer |= {f"exp_avg/expert.{e}": row for e, row in enumerate(torch.randn(4, 3, 3).unbind())}
    path = checkpoint.save(tmp_path / "a" / "checkpoints", saved, keep=1, score=2.5)
    assert path == tmp_path / "a" / "checkpoints" / "step-00000123"
    assert_same_bits(checkpoint.load(path), saved)


def test_a_checkpoint_holds_safetensors_and_json_and_every_file_is_in_the_manifest(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1, score=2.5)
    names = {file.name for file in path.iterdir()}
    manifest = json.loads((path / "manifest.json").read_text())
    assert names == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "meta.json", "manifest.json"}
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert (manifest["step"], manifest["score"]) == (1, 2.5)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # whoever may read one may read them all


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    loaded = checkpoint.load(path)
    pid = os.fork()  # in a child, because reading a memory map of a file cut short would kill the process
    if pid == 0:
        for file in path.iterdir():
            os.truncate(file, 0)
        assert_same_bits(loaded, snapshot(1))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_random_generators_continue_where_they_were_saved(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()  # noqa: NPY002

    random.gauss(0, 1), np.random.normal()  # noqa: NPY002 — each leaves a second normal number pending in the state
    tensors, state = state_module.rng_state()
    path = checkpoint.save(tmp_path, Snapshot(1, {}, {}, {"rng": state}, tensors), keep=1)
    expected = draw()
    assert draw() != expected
    loaded = checkpoint.load(path)
    state_module.set_rng_state(loaded.rng, loaded.meta["rng"])
    assert draw() == expected


def test_a_number_in_the_metadata_that_is_not_finite_is_null_and_costs_no_checkpoint(tmp_path):
    meta = {"nan": float("nan"), "inf": [{"deep": -float("inf")}], "one": 1.0}
    path = checkpoint.save(tmp_path, Snapshot(1, {}, {}, meta, {}), keep=1)
    assert checkpoint.load(path).meta == {"nan": None, "inf": [{"deep": None}], "one": 1.0}


@pytest.mark.parametrize("meta", [{"tuple": (1, 2)}, {"key": {1: 2}}])
def test_metadata_that_json_would_alter_is_refused_before_anything_is_written(tmp_path, meta):
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "root", Snapshot(1, {}, {}, meta, {}), keep=1)
    assert not (tmp_path / "root").exists()


def test_a_model_that_is_read_while_it_is_written_is_the_same_checkpoint_with_one_tensor_in_memory(tmp_path):
    whole = snapshot(1)
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert [tensor for tensor in alive if tensor() is not None] == [], "an earlier one is still held"
        tensor = whole.model[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = Tensors({name: tensor.to("meta") for name, tensor in whole.model.items()}, read)
    path = checkpoint.save(tmp_path, dataclasses.replace(whole, model=lazy), keep=1)
    assert len(alive) == 2
    assert_same_bits(checkpoint.load(path), whole)


def test_tensors_that_share_memory_are_refused_and_leave_nothing(tmp_path):
    w = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.save(tmp_path, Snapshot(1, {"a": w, "b": w}, {}, {}, {}), keep=1)
    assert os.listdir(tmp_path) == []


def test_the_newest_k_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))):
        checkpoint.save(tmp_path, snapshot(step), keep=2, score=score)
    assert steps(tmp_path) == [2, 4, 5]
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"
    checkpoint.save(tmp_path, snapshot(6), keep=2, score=1.0)  # as good and newer
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000006"
    assert steps(tmp_path) == [5, 6]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, snapshot(step), keep=1)
    assert steps(tmp_path) == [100_000_000]


def test_keeping_the_last_k_counts_only_verified_checkpoints(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, snapshot(step), keep=3)
    for step in (2, 3):
        flip_a_bit(tmp_path / f"step-{step:08d}" / "optimizer.safetensors")
    checkpoint.save(tmp_path, snapshot(4), keep=2)
    assert steps(tmp_path) == [1, 2, 3, 4]  # 4 and 1 are the newest two that can be loaded
    checkpoint.save(tmp_path, snapshot(5), keep=2)
    assert steps(tmp_path) == [2, 3, 4, 5]


def test_a_damaged_best_is_not_the_best(tmp_path):
    for step, score in ((1, 1.0), (2, 2.0), (3, 3.0)):
        checkpoint.save(tmp_path, snapshot(step), keep=3, score=score)
    flip_a_bit(tmp_path / "step-00000001" / "model.safetensors")
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"
    checkpoint.save(tmp_path, snapshot(4), keep=1, score=4.0)
    assert steps(tmp_path) == [1, 2, 4]


def test_the_checkpoint_just_written_is_never_deleted(tmp_path):
    checkpoint.save(tmp_path, snapshot(9), keep=1)
    checkpoint.save(tmp_path, snapshot(5), keep=1)
    assert steps(tmp_path) == [5, 9]


def test_saving_a_step_again_keeps_the_verified_checkpoint_and_touches_nothing(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    again = snapshot(1)
    again.model["w"] += 1
    assert checkpoint.save(tmp_path, again, keep=1, warn=no_warning) == path
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before


def test_saving_a_step_whose_checkpoint_is_damaged_moves_that_aside_with_one_warning(tmp_path):
    for n in (1, 2):
        path = checkpoint.save(tmp_path, snapshot(7), keep=1)
        flip_a_bit(path / "model.safetensors")
        warnings: list[str] = []
        assert checkpoint.save(tmp_path, snapshot(7), keep=1, warn=warnings.append) == path
        assert len(warnings) == 1
        assert str(path / "model.safetensors") in warnings[0]
        assert f"step-00000007.damaged-{n}" in warnings[0]
        assert (tmp_path / f"step-00000007.damaged-{n}").is_dir()
        assert_same_bits(checkpoint.load(path), snapshot(7))


def test_a_score_can_be_added_once_and_changes_nothing_else(tmp_path):
    checkpoint.save(tmp_path, snapshot(1), keep=1, score=2.0)
    path = checkpoint.save(tmp_path, snapshot(2), keep=1)
    assert checkpoint.best(tmp_path).name == "step-00000001"
    checkpoint.add_score(path, 1.0, keep=1)
    checkpoint.add_score(path, 5.0, keep=1)  # it has one
    assert json.loads((path / "manifest.json").read_text())["score"] == 1.0
    assert_same_bits(checkpoint.load(path), snapshot(2))
    assert checkpoint.best(tmp_path) == path
    assert list(tmp_path.iterdir()) == [path], "the best of before is superseded"


def test_a_score_that_cannot_be_written_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match=r"manifest\.json cannot be written"):
        checkpoint.add_score(path, 1.0, keep=1)
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.verify(path)


def test_no_checkpoint_at_all_is_none_and_no_error(tmp_path):
    assert checkpoint.latest(tmp_path / "missing", no_warning) is None
    (tmp_path / "step-00000001.tmp-1").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoint.latest(tmp_path, no_warning) is None
    assert checkpoint.best(tmp_path) is None


def test_the_newest_is_the_latest_without_a_warning(tmp_path):
    for step in (1, 2, 10):
        path = checkpoint.save(tmp_path, snapshot(step), keep=5)
    assert checkpoint.latest(tmp_path, no_warning) == path


def test_a_damaged_newest_falls_back_with_one_warning_that_names_the_files(tmp_path):
    paths = [checkpoint.save(tmp_path, snapshot(step), keep=3) for step in (1, 2, 3)]
    flip_a_bit(paths[2] / "rng.safetensors")
    os.remove(paths[1] / "meta.json")
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) == paths[0]
    assert len(warnings) == 1
    for named in (paths[2] / "rng.safetensors", paths[1] / "meta.json", paths[0]):
        assert str(named) in warnings[0]


def test_checkpoints_of_which_none_is_good_are_an_error(tmp_path):
    for step in (1, 2):
        flip_a_bit(checkpoint.save(tmp_path, snapshot(step), keep=2) / "meta.json", bit=9)
    with pytest.raises(BadInput, match=r"step-00000002/meta\.json"):
        checkpoint.latest(tmp_path, no_warning)


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    names = left_by_others(tmp_path / "step-00000001")
    for folder in names.values():
        folder.mkdir()
        (folder / "model.safetensors").touch()
    path = checkpoint.save(tmp_path, snapshot(2), keep=1)
    assert set(tmp_path.iterdir()) == {path, names["live"], names["elsewhere"]}


@pytest.mark.parametrize("place", ["file", "file/checkpoints"])
def test_a_root_that_cannot_be_a_folder_is_refused_in_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="cannot be written") as caught:
        checkpoint.save(tmp_path / place, snapshot(1), keep=1)
    assert str(tmp_path / place) in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoint.latest(tmp_path / place, no_warning)
