"""Claims about tensors in files by rank: what any layout wrote, any other reads, to the bit."""

import pickletools

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe.errors import BadInput
from moe.parallel.gradients import whole
from moe.run import shards
from tests.ranks import run_ranks


def full():
    """Weights on the dense mesh, experts on theirs, an optimiser's step and a plain buffer."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "blocks.0.attn.q.weight": (7, 5),
        "experts.w_EFD": (8, 4, 6),
        "exp_avg/experts.w_EFD": (8, 4, 6),
        "bias": (9,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"step/blocks.0.attn.q.weight": torch.tensor(5.0)}


def on_meshes(tensors, replicate: int, shard: int, ep: int):
    if replicate * shard == 1:
        return {name: value.clone() for name, value in tensors.items()}
    dense = init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    experts = init_device_mesh("cpu", (replicate, shard // ep, ep), mesh_dim_names=("replicate", "expert_shard", "ep"))
    placed = {}
    for name, value in tensors.items():
        if "experts" in name:
            placed[name] = distribute_tensor(value, experts, [Replicate(), Shard(1), Shard(0)])
        else:
            placed[name] = (
                distribute_tensor(value, dense, [Replicate(), Shard(0)]) if value.dim() == 2 else value.clone()
            )
    return placed


def _written(folder, *sizes):
    if sizes == (1, 1, 1):  # as one process does
        save_file({name: value for name, value in full().items() if "/" not in name}, folder / "model.safetensors")
        save_file({name: value for name, value in full().items() if "/" in name}, folder / "optimizer.safetensors")
        save_file({"cpu": torch.get_rng_state()}, folder / "rng.safetensors")
    else:
        shards.write(folder, on_meshes(full(), *sizes))


def _read(folder, *sizes):
    placed = on_meshes({name: torch.zeros_like(value) for name, value in full().items()}, *sizes)
    shards.read_into(folder, placed, alone=sizes == (1, 1, 1))
    return {name: whole(value) for name, value in placed.items()}


LAYOUTS = [(1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (1, 4, 2), (1, 4, 4), (2, 2, 2), (4, 1, 1)]


@pytest.mark.parametrize("wrote", LAYOUTS, ids=str)
def test_what_one_layout_wrote_every_other_and_one_process_reads_to_the_bit(tmp_path, wrote):
    run_ranks(wrote[0] * wrote[1], _written, tmp_path, *wrote)
    alone = shards.read(tmp_path)
    assert alone.keys() == full().keys() == shards.shapes(tmp_path).keys()
    assert all(torch.equal(alone[name], value) for name, value in full().items())
    for reads in LAYOUTS:
        for tensors in run_ranks(reads[0] * reads[1], _read, tmp_path, *reads):
            assert all(torch.equal(tensors[name], value) for name, value in full().items()), reads


def test_every_rank_writes_its_own_part_once(tmp_path):
    run_ranks(4, _written, tmp_path, 2, 2, 2)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("shard-*"))]
    assert len(sizes) == 4
    headers = 4 * 1500
    assert sum(sizes) < sum(value.nbytes for value in full().values()) + headers  # copies are not written twice


def test_nothing_on_disk_is_pickled(tmp_path):
    run_ranks(2, _written, tmp_path, 1, 2, 2)
    for path in tmp_path.iterdir():
        assert path.suffix == ".safetensors"
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def _refused(folder, name, shape):
    try:
        shards.read_into(folder, {name: torch.zeros(shape)})
    except BadInput as bad:
        return str(bad)


def test_a_name_or_a_shape_that_is_not_there_is_named_on_every_rank(tmp_path):
    run_ranks(2, _written, tmp_path, 1, 2, 1)
    for said in run_ranks(2, _refused, tmp_path, "blocks.1.attn.q.weight", (7, 5)):
        assert said == f"{tmp_path}: the tensor blocks.1.attn.q.weight is missing."
    for said in run_ranks(2, _refused, tmp_path, "bias", (8,)):
        assert said == f"{tmp_path}: the tensor bias has shape (9,), and (8,) is needed."


def test_a_shard_that_is_not_there_is_found_by_what_is_missing(tmp_path):
    run_ranks(2, _written, tmp_path, 1, 2, 2)
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(BadInput, match=r"the tensor [\w./]+ is not whole: a shard is missing"):
        shards.read(tmp_path)


def test_files_that_are_no_tensors_are_a_sentence(tmp_path):
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"garbage")
    with pytest.raises(BadInput, match="its tensors cannot be read"):
        shards.read(tmp_path)
