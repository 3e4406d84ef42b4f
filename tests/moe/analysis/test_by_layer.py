"""Claims about a trace made layer by layer: it is the whole model's, bit by bit, and leaves nothing else behind."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moe.analysis.by_layer import Arrays, trace_by_layer
from moe.analysis.trace import KEY, About, Batch, Recorder, Writer
from moe.analysis.windows import of_ids
from moe.config.model import layer_moe, moe_layers
from moe.convert.hf_stream import Parts
from moe.convert.hf_weights import load
from moe.errors import BadInput
from moe.model.transformer import next_token_loss
from tests.moe.convert.test_hf_stream import MOE
from tests.moe.convert.test_hf_weights import theirs
from tests.small_runs import silent

S = 8


@pytest.fixture
def windows(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 48, 7 * S + 1))
    return of_ids(tmp_path / "ids.npy", 48, S, 3, 0)  # batches of 3, 2 and 2 windows


def _about(cfg, windows):
    layers = moe_layers(cfg)
    n_experts = [layer_moe(cfg, layer).n_experts for layer in layers]
    return About("folder", "", "", 48, S, layers, n_experts, cfg.moe.k, windows.domains, windows.sampling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", MOE)
def test_a_trace_by_layer_has_the_files_of_the_whole_models(variant, dtype, tmp_path, windows):
    folder = tmp_path / "model"
    theirs(variant).to(dtype).save_pretrained(folder, max_shard_size="15KB")
    model = load(folder).eval()
    about, routed, losses = _about(model.cfg, windows), [], []
    with Writer(tmp_path / "whole", about) as writer, Recorder(model, about.k) as recorder:
        for read_BS1, *rest, _ in windows:
            tokens_BS, targets_BS = read_BS1[:, :-1], read_BS1[:, 1:]
            columns = recorder.run(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
            writer.add(Batch(tokens_BS, targets_BS, *rest, *columns))
            # The model's own words, past the recorder.
            with torch.no_grad():
                output = model(torch.from_numpy(tokens_BS))
            routed.append(torch.stack([routing.expert for routing in output.routing], 1))
            losses.append(next_token_loss(output.logits_BSV, torch.from_numpy(targets_BS), "none").flatten())
    parts = Parts(folder)
    with Writer(tmp_path / "streamed", about) as writer:
        trace_by_layer(parts.model, parts.held, windows, writer, silent)
    for name in ("tokens", "routes", "counts"):
        files = [tmp_path / trace / f"{name}.parquet" for trace in ("whole", "streamed")]
        tables = [pq.read_table(file) for file in files]
        assert tables[0].equals(tables[1], check_metadata=True), name
        assert files[0].read_bytes() == files[1].read_bytes(), name
    experts = tables_of(tmp_path / "streamed")["expert"].combine_chunks().flatten().to_numpy()
    assert torch.equal(torch.tensor(experts).long(), torch.cat(routed).flatten())
    loss = pq.read_table(tmp_path / "streamed" / "tokens.parquet")["loss"].to_numpy()
    assert torch.equal(torch.tensor(loss), torch.cat(losses))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "model", "streamed", "whole"]
    assert sorted(path.stem for path in (tmp_path / "streamed").iterdir()) == ["counts", "routes", "tokens"]


def tables_of(folder):
    routes = pq.read_table(folder / "routes.parquet")
    layers = json.loads(routes.schema.metadata[KEY])["layers"]
    n_tokens = len(routes) // len(layers)
    assert routes["token_row"].to_pylist() == np.repeat(np.arange(n_tokens), len(layers)).tolist()
    assert routes["layer"].to_pylist() == layers * n_tokens
    return routes


def test_one_part_at_a_time_has_memory(tmp_path, windows):
    theirs("olmoe").save_pretrained(tmp_path / "model")
    parts, held = Parts(tmp_path / "model"), []

    def hold(*modules):
        assert {p.device.type for p in parts.model.parameters()} == {"meta"}
        held.append(modules)
        return parts.held(*modules)

    with Writer(tmp_path / "trace", _about(parts.model.cfg, windows)) as writer:
        trace_by_layer(parts.model, hold, windows, writer, silent)
    model = parts.model
    assert held == [(model.embed,), *((block,) for block in model.blocks), (model.norm, model.head)]


def test_what_fails_on_the_way_leaves_nothing(tmp_path, windows):
    theirs("olmoe").save_pretrained(tmp_path / "model")
    parts = Parts(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(BadInput), Writer(tmp_path / "trace", _about(parts.model.cfg, windows)) as writer:
        trace_by_layer(parts.model, parts.held, windows, writer, silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "model"]


def test_arrays_come_back_as_they_were_put_and_can_be_replaced(tmp_path):
    arrays = Arrays(tmp_path / "a")
    put = [np.arange(6.0).reshape(2, 3), np.zeros((1, 2), np.int32), np.arange(5, dtype=np.float16)]
    for array in put:
        arrays.append(array)
    arrays[0] = put[0].T.copy().T * 2  # not contiguous
    assert [arrays[i].tolist() for i in (2, 1, 0)] == [put[2].tolist(), put[1].tolist(), (put[0] * 2).tolist()]
    assert [arrays[i].dtype for i in range(3)] == [array.dtype for array in put]
    with pytest.raises(AssertionError):
        arrays[0] = np.zeros((3, 2))
    arrays.close()
