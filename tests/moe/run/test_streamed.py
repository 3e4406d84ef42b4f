"""Claims about safetensors files that are read and written one tensor at a time: against safetensors itself."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe.errors import BadInput
from moe.run import streamed
from moe.run.streamed import Tensors, in_memory

TENSORS = {
    "a.matrix": torch.arange(12.0).view(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "number": torch.tensor(7, dtype=torch.int64),
    "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "true": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_safetensors_wrote_is_read_as_it_reads_it(path):
    save_file(TENSORS, path)
    opened = streamed.opened(path)
    assert opened.keys() == TENSORS.keys()
    for name, tensor in load_file(path).items():
        assert torch.equal(opened[name], tensor)
        assert (opened.meta[name].shape, opened.meta[name].dtype) == (tensor.shape, tensor.dtype)
    assert opened.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_safetensors_reads_what_is_written_of_views_and_in_any_order(path):
    tensors = dict(reversed(TENSORS.items())) | {"view": TENSORS["a.matrix"].T}
    streamed.write(path, in_memory(tensors).meta, iter(tensors.values()))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name
            assert file.get_tensor(name).dtype == tensor.dtype


def test_a_tensor_is_read_when_it_is_asked_for_and_not_before():
    asked = []
    tensors = Tensors({name: torch.empty(2, device="meta") for name in "ab"}, lambda name: asked.append(name) or name)
    assert (list(tensors), len(tensors), "a" in tensors, "c" in tensors, asked) == (["a", "b"], 2, True, False, [])
    assert (tensors["b"], asked) == ("b", ["b"])


def test_another_dtype_is_told_beforehand_and_a_number_beyond_it_refused_by_name():
    tensors = in_memory({"fits": torch.ones(2), "large": torch.full((2,), 3.4e38), "nan": torch.tensor(float("nan"))})
    narrow = tensors.to(torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.meta.values()} == {torch.bfloat16} == {narrow["fits"].dtype}
    assert narrow.nbytes == tensors.nbytes / 2
    for name, dtype in (("large", torch.bfloat16), ("nan", torch.float32)):
        with pytest.raises(BadInput, match=f"the weight {name} is not finite in {str(dtype)[6:]}."):
            tensors.to(dtype)[name]
    assert torch.equal(tensors.to(torch.float32)["large"], tensors["large"])


def test_the_dtype_of_several_holds_all_of_them():
    half, brain = (torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    assert in_memory({"a": half, "b": half}).dtype == torch.float16
    assert in_memory({"a": half, "b": brain}).dtype == torch.float32


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(header, data=b"\0" * 8, n_bytes=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (n_bytes if n_bytes is not None else len(text)).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is not all there"),
        (b"short", "its header is not all there"),
        (raw(HEADER, n_bytes=10**12), "its header is not all there"),
        (raw(b"[]"), "its header is damaged"),
        (raw(b"{x}"), "its header is damaged"),
        (raw(HEADER, b"\0" * 7), "bytes, and its header says"),
        (raw(HEADER, b"\0" * 9), "bytes, and its header says"),
        (raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "a has offsets 0, 8"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), "a has offsets 4, 12"),
        (raw({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "shape"),
        (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}), "KeyError"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_as_safetensors_refuses_it(content, message, path):
    path.write_bytes(raw(HEADER))
    assert streamed.places(path)["a"].shape == (2,)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.safetensors is not a whole safetensors file") as refused:
        streamed.places(path)
    assert message in str(refused.value)
    with pytest.raises(Exception):  # noqa: B017 — whatever it raises
        load_file(path)


def test_a_kind_of_number_that_is_not_known_is_placed_and_not_read(path):
    path.write_bytes(raw({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}))
    assert streamed.places(path)["a"].dtype == "F8_E4M3"
    with pytest.raises(BadInput, match="tensor a is F8_E4M3; accepted are F64"):
        streamed.opened(path)


def test_a_file_that_is_cut_short_or_gone_since_is_refused(path):
    save_file(TENSORS, path)
    opened, placed = streamed.opened(path), streamed.places(path)
    path.write_bytes(path.read_bytes()[:-1])
    last = max(placed, key=lambda name: placed[name].start)
    with pytest.raises(BadInput, match=f"ends in the middle of the tensor {last}"):
        opened[last]
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        opened[last]
    with pytest.raises(BadInput, match="cannot be read"):
        streamed.places(path)


def test_a_disk_without_room_is_refused_with_the_bytes_needed_and_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    streamed.check_room(tmp_path / "not" / "there", 1234)
    with pytest.raises(BadInput, match="it needs 1,235 bytes and 1,234 are free"):
        streamed.check_room(tmp_path / "not" / "there", 1235)
