"""Claims about holding a folder's model part by part: against the whole model that `load` gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.convert.hf_families import FAMILIES
from moe.convert.hf_stream import Parts
from moe.convert.hf_weights import load
from moe.errors import BadInput
from moe.model.transformer import model_tensors
from tests.moe.convert.test_hf_weights import VARIANTS, theirs

MOE = [name for name, (family, _) in VARIANTS.items() if FAMILIES[family].moe]


@pytest.mark.parametrize("variant", MOE)
def test_every_part_holds_what_the_whole_model_has(variant: str, tmp_path: Path) -> None:
    theirs(variant).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="15KB")
    whole, parts = load(tmp_path), Parts(tmp_path)
    seen = set()
    for name in ("embed", "norm", "head", *(f"blocks.{i}" for i in range(whole.cfg.n_layers))):
        if name == "head" and whole.cfg.tie_embeddings:
            continue
        part = parts.model.get_submodule(name)
        with parts.held(part):
            expected = whole.get_submodule(name).state_dict()
            assert part.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in part.state_dict().items())
            here = {key for key, tensor in parts.model.state_dict().items() if tensor.device.type == "cpu"}
            assert here == {f"{name}.{key}" for key in expected}, "nothing else has memory"
        seen |= here
    assert {p.device.type for p in parts.model.parameters()} == {"meta"}
    tied = {"head.weight"} if whole.cfg.tie_embeddings else set()
    assert seen == whole.state_dict().keys() - tied
    assert torch.equal(parts.model.cos_Sd, whole.cos_Sd)
    assert torch.equal(parts.model.sin_Sd, whole.sin_Sd)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stacked", [False, True])
def test_every_tensor_that_is_read_by_itself_is_the_whole_models(variant: str, stacked: bool, tmp_path: Path) -> None:
    theirs(variant).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="15KB", save_original_format=not stacked
    )
    whole, tensors = load(tmp_path, None), Parts(tmp_path).tensors()
    assert tensors.keys() == model_tensors(whole).keys()
    for name, tensor in model_tensors(whole).items():
        assert torch.equal(tensors[name], tensor), name
        assert tensors[name].dtype == tensors.meta[name].dtype == torch.bfloat16
        assert tensors.meta[name].shape == tensor.shape


def test_a_part_is_let_go_where_what_it_is_used_for_fails(tmp_path: Path) -> None:
    theirs("olmoe").save_pretrained(tmp_path)
    parts = Parts(tmp_path)
    with pytest.raises(RuntimeError), parts.held(parts.model.blocks[0]):
        raise RuntimeError
    assert {p.device.type for p in parts.model.parameters()} == {"meta"}


def test_a_folder_that_does_not_fit_is_refused_before_a_part_is_read(tmp_path: Path) -> None:
    theirs("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(BadInput, match=f"tensor {name} is missing"):
        Parts(tmp_path)
    save_file(tensors | {name: torch.ones(32, dtype=torch.int8)}, path)
    with pytest.raises(BadInput, match="is I8"):
        Parts(tmp_path)


def test_a_file_that_is_cut_short_since_is_refused(tmp_path: Path) -> None:
    theirs("mixtral").save_pretrained(tmp_path)
    parts, path = Parts(tmp_path), tmp_path / "model.safetensors"
    last = max(parts.places, key=lambda name: parts.places[name].start)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadInput, match=f"ends in the middle of the tensor {last}"):
        parts.read(last)
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read"), parts.held(parts.model.norm):
        pass


def test_a_head_that_is_not_the_embedding_is_refused_where_the_settings_tie_them(tmp_path: Path) -> None:
    theirs("qwen3_moe-first-dense").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for head, refused in ((tensors["model.embed_tokens.weight"].clone(), False), (torch.zeros(48, 32), True)):
        save_file(tensors | {"lm_head.weight": head}, path)
        parts = Parts(tmp_path)
        if refused:
            with pytest.raises(BadInput, match="tie_word_embeddings"), parts.held(parts.model.embed):
                pass
            with pytest.raises(BadInput, match="tie_word_embeddings"):
                parts.tensors()["embed.weight"]
        else:
            with parts.held(parts.model.embed):
                assert torch.equal(parts.model.embed.weight, head)
            assert torch.equal(parts.tensors()["embed.weight"], head)
