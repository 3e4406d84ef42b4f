"""Claims about what other programs recorded: every number comes back out of the trace, and nothing else is opened."""

import base64
import json
import pickle

import numpy as np
import pytest
import torch

from moe.analysis.records import write_trace
from moe.analysis.trace import Trace
from moe.errors import BadInput

T, L, K, E = 9, 3, 2, 6


def _routed(t=T, layers=L, k=K, seed=0):
    generator = np.random.default_rng(seed)
    ranked = generator.random((t, layers, E)).argsort(-1)
    return ranked[..., :k].astype(np.int32)


def _tokens(trace, *names):
    table = trace.table("tokens")
    return [table[name].to_pylist() for name in names]


def _pass(expert_TLK, first=0, **more):
    t = len(expert_TLK)
    padded = np.full((L + 1, t, 8), -1, np.int32)  # a dense layer before, and room for 8 choices
    padded[1:, :, :K] = expert_TLK.transpose(1, 0, 2)
    ids = list(range(100 + first, 100 + first + t))
    return {"topk_ids_of_layer": torch.from_numpy(padded), "input_ids": ids, "positions": list(range(t)), **more}


def test_what_sglang_recorded_comes_back(tmp_path):
    """Two passes: two prompts behind each other, and a step of decoding two requests."""
    parts = _routed(5), _routed(4, seed=1), _routed(2, seed=2)
    prompts = _pass(np.concatenate(parts[:2]), misc_objects=[{"layer_id": 1}], forward_mode=1)
    prompts["positions"] = [0, 1, 2, 3, 4, 0, 1, 2, 3]
    decode = _pass(parts[2], 9)
    decode["positions"] = [5, 4]
    torch.save({"records": [prompts, decode]}, tmp_path / "r.pt")
    write_trace(tmp_path / "r.pt", "sglang", tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    assert trace.experts().tolist() == np.concatenate(parts).tolist()
    assert trace.about.layers == [1, 2, 3]
    token, after, doc, pos, window = _tokens(trace, "token", "next", "doc", "pos", "window")
    assert token == list(range(100, 111))
    assert after == [101, 102, 103, 104, -1, 106, 107, 108, -1, -1, -1]
    assert doc == [0] * 5 + [1] * 4 + [2, 3]
    assert pos == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 4]
    assert window == [0] * 9 + [1] * 2
    count = [np.bincount(layer.ravel(), minlength=E).tolist() for layer in np.concatenate(parts).transpose(1, 0, 2)]
    assert [layer.sum(0).tolist() for layer in trace.counts] == count
    routes = trace.table("routes").to_pandas()
    assert routes.margin.isna().all()
    assert routes.entropy.isna().all()
    assert np.isnan(np.stack(routes.weight.to_numpy()).astype(float)).all()
    assert trace.table("tokens")["loss"].to_pandas().isna().all()


def test_physical_experts_are_told_by_their_logical_numbers(tmp_path):
    expert_TLK = _routed()
    physical_LP = np.stack([np.random.default_rng(i).permutation(E) for i in range(L + 1)])
    physical_TLK = np.stack([physical_LP[i + 1].argsort()[expert_TLK[:, i]] for i in range(L)], 1)
    torch.save(
        {"records": [_pass(physical_TLK)], "last_physical_to_logical_map": torch.from_numpy(physical_LP)},
        tmp_path / "r.pt",
    )
    write_trace(tmp_path / "r.pt", "sglang", tmp_path / "trace")
    assert Trace(tmp_path / "trace").experts().tolist() == expert_TLK.tolist()


def test_rows_that_nobody_recorded_are_no_experts(tmp_path):
    one = _pass(_routed())
    one["topk_ids_of_layer"][2, 4:] = -1
    np.savez(tmp_path / "r.npz", **one)
    write_trace(tmp_path / "r.npz", "sglang", tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    assert (trace.experts()[4:, 1] < 0).all()
    assert trace.counts[1].sum() == 4 * K
    assert trace.experts()[:4].tolist() == _routed()[:4].tolist()


def _response(expert_TLK, **more):
    data = base64.b64encode(expert_TLK.astype("<i4").tobytes()).decode()
    return {"meta_info": {"routed_experts": data}, "shape": list(expert_TLK.shape), **more}


@pytest.mark.parametrize("kind", ["npy", "npz", "json", "jsonl", "lists"])
def test_what_a_response_returned_comes_back(tmp_path, kind):
    expert_TLK, ids = _routed(), list(range(10, 10 + T + 1))  # the last token was not routed
    path = tmp_path / f"r.{'json' if kind == 'lists' else kind}"
    match kind:
        case "npy":
            np.save(path, expert_TLK.astype(np.int16))
        case "npz":
            np.savez(path, routed_experts=expert_TLK.astype(np.int16), input_ids=ids)
        case "lists":
            path.write_text(json.dumps([{"routed_experts": expert_TLK.tolist(), "input_ids": ids}]))
        case _:
            path.write_text(json.dumps(_response(expert_TLK, input_ids=ids)) + "\n")
    write_trace(path, "vllm", tmp_path / "trace", n_experts=2 * E)
    trace = Trace(tmp_path / "trace")
    assert trace.experts().tolist() == expert_TLK.tolist()
    assert trace.about.n_experts == [2 * E] * L
    known = kind != "npy"
    token, after, pos = _tokens(trace, "token", "next", "pos")
    assert token == (ids[:T] if known else [-1] * T)
    assert after == ([*ids[1:T], -1] if known else [-1] * T)
    assert pos == (list(range(T)) if known else [-1] * T)


def test_responses_are_documents_of_their_own_and_may_begin_within_one(tmp_path):
    first, second, ids = _routed(), _routed(4, seed=1), list(range(T))
    late = _response(second, input_ids=ids) | {"routed_experts_start_len": 5}
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, (_response(first, input_ids=ids), late))))
    write_trace(tmp_path / "r.jsonl", "vllm", tmp_path / "trace")
    token, doc, pos = _tokens(Trace(tmp_path / "trace"), "token", "doc", "pos")
    assert token == [*ids, 5, 6, 7, 8]
    assert doc == [0] * T + [1] * 4
    assert pos == [*range(T), 5, 6, 7, 8]
    assert Trace(tmp_path / "trace").experts().tolist() == np.concatenate([first, second]).tolist()


def _megatron(path, steps, **more):
    lines = []
    for step, micro_batches in enumerate(steps):
        for expert_TLK in micro_batches:
            for layer in range(expert_TLK.shape[1]):
                top = expert_TLK[:, layer]
                record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": 2 * layer + 1, "rank": 0}
                lines.append(record | {"num_tokens": len(top), "topk": K, "top_indices": top.tolist()} | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_what_megatron_recorded_comes_back_step_by_step(tmp_path):
    steps = [[_routed(4), _routed(5, seed=1)], [_routed(6, seed=2)]]
    lines = _megatron(tmp_path / "r.jsonl", steps, hs_offset=0, hs_bytes=9, hs_shape=[1, 1])
    other = lines[0] | {"block": "mtp", "mtp_idx": 0, "top_indices": [[0, 1]], "num_tokens": 1}
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write(json.dumps(other) + "\n")
    (tmp_path / "hidden_states_rank0.bin").write_bytes(b"not looked at")
    write_trace(tmp_path / "r.jsonl", "megatron", tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    assert trace.experts().tolist() == np.concatenate([*steps[0], *steps[1]]).tolist()
    assert trace.about.layers == [1, 3, 5]
    token, doc, pos = _tokens(trace, "token", "doc", "pos")
    assert doc == [0] * 9 + [1] * 6
    assert token == pos == [-1] * 15


class _Bomb:
    def __reduce__(self):
        return (open, ("opened", "w"))


def _write(path, content):
    match content:
        case bytes():
            path.write_bytes(content)
        case str():
            path.write_text(content)
        case _ if path.suffix == ".pt":
            torch.save(content, path)
        case np.ndarray():
            np.save(path, content, allow_pickle=True)
        case _:
            np.savez(path, **content)


@pytest.mark.parametrize(
    ("kind", "name", "content", "sentence"),
    [
        ("sglang", "r.pt", {"records": [_Bomb()]}, "more than tensors and plain values, which is never opened"),
        ("sglang", "r.pt", pickle.dumps(_Bomb()), "r.pt is refused"),
        ("sglang", "r.pt", b"nonsense", "r.pt is refused"),
        ("sglang", "r.pt", {"logical_count": torch.zeros(3)}, "it has no list of `records`"),
        ("sglang", "r.pt", {"records": [{"global_physical_count": [1]}]}, "mode must be per_token"),
        ("sglang", "r.pt", {"records": []}, "no token that was routed"),
        ("sglang", "r.pt", {"records": [_pass(_routed()) | {"input_ids": [1]}]}, "9 routed tokens, 1 input_ids"),
        ("sglang", "r.pt", {"records": [_pass(_routed()) | {"positions": [0.5] * T}]}, "positions must be whole"),
        (
            "sglang",
            "r.pt",
            {"records": [_pass(_routed())], "last_physical_to_logical_map": [[0, 1]] * 4},
            r"map \(4, 2\) that does not fit",
        ),
        ("sglang", "none.pt", None, "cannot be read"),
        ("vllm", "r.npy", np.array([_Bomb()]), "no whole file of arrays"),
        ("vllm", "r.npy", _routed().astype(float), "whole numbers of 3 dimensions"),
        ("vllm", "r.npy", _routed()[0], "whole numbers of 3 dimensions"),
        ("vllm", "r.npz", b"PK nonsense", "no whole file of arrays"),
        ("vllm", "r.npz", {"other": np.zeros(3)}, "has no routed_experts"),
        ("vllm", "r.json", "{", "line 1 is no JSON"),
        ("vllm", "r.jsonl", json.dumps(_response(_routed()) | {"shape": None}), r"`shape` must say \[tokens, layers"),
        ("vllm", "r.jsonl", json.dumps(_response(_routed()) | {"shape": [9, 9, 9]}), "routed_experts of 216 bytes"),
        ("vllm", "r.jsonl", json.dumps({"routed_experts": "%", "shape": [1, 1, 1]}), "no base64"),
        ("vllm", "r.jsonl", json.dumps({"routed_experts": [[[1], [2, 3]]]}), "whole numbers of 3 dimensions"),
        ("vllm", "r.jsonl", json.dumps({"routed_experts": [[[2**40]]]}), "no number of a token or an expert"),
        ("megatron", "r.jsonl", '{"step": 1}', "line 1 is no record of megatron"),
        ("megatron", "r.jsonl", '{"step": 0, "layer": 0, "top_indices": [[1]], "num_tokens": 2}', "num_tokens=2"),
        (
            "megatron",
            "r.jsonl",
            '{"step": 0, "layer": 0, "top_indices": [[1]]}\n{"step": 0, "layer": 1, "top_indices": [[1], [2]]}',
            "not the same tokens and K in all of its layers",
        ),
        (
            "megatron",
            "r.jsonl",
            '{"step": 0, "layer": 0, "top_indices": [[1]]}\n{"step": 1, "layer": 1, "top_indices": [[1]]}',
            "of two models",
        ),
    ],
)
def test_what_is_damaged_or_a_pickle_is_refused_in_a_sentence(tmp_path, monkeypatch, kind, name, content, sentence):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        _write(tmp_path / name, content)
    with pytest.raises(BadInput, match=sentence) as refused:
        write_trace(tmp_path / name, kind, tmp_path / "trace")
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {name}, "nothing was written, and no code of the file run"


def test_an_expert_that_there_is_not_is_refused(tmp_path):
    np.save(tmp_path / "r.npy", _routed())
    with pytest.raises(BadInput, match="names expert 5, and n_experts=4"):
        write_trace(tmp_path / "r.npy", "vllm", tmp_path / "trace", n_experts=4)
