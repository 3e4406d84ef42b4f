"""Peers are called as their sources say, on weights in their own layout, and checked before anyone times them."""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from experiments.suites import layer as layer_suite
from experiments.suites import peers, shapes
from experiments.suites.cases import Rows, Wrong, run
from experiments.suites.timing import Ceilings
from tests import fake_cuda

pytestmark = fake_cuda.interpreted
CPU = torch.device("cpu")


def _settings(**changes):
    given = {"shapes": {"tiny": shapes.Shape(9, 12, 8, 4, 3)}, "dtype": torch.float32, "rounds": 1, "seconds": 0.0}
    return layer_suite.Settings(CPU, Ceilings(1e9, 1e9, 0.0), **given | changes)


def _check(name):
    layer = layer_suite.Layer(_settings(), "tiny", "uniform")
    x, w_up, w_down, expert, weight, dout = layer.inputs
    peer = peers.PEERS[name]
    weights = tuple(each.detach().requires_grad_() for each in peer.layout(w_up, w_down))
    return peers.check(peer.run, weights, (x, expert, weight), dout, layer.expected)


def _module(monkeypatch, name, **members):
    """Pretend that a module is installed."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(path, None)
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def _swiglu(x, w_gate, w_up, w_down):
    """One expert, weights (F, D), (F, D), (D, F)."""
    return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


@pytest.mark.parametrize("name", ["triton", "torch", "grouped_mm", "transformers"])
def test_what_is_installed_agrees_with_the_reference(name):
    assert not peers.missing(name)
    assert max(_check(name).values()) < 1e-5


def test_products_in_fp8_are_wrong_by_their_rounding_and_are_let_by_as_such():
    with pytest.raises(Wrong, match="relative error of y"):
        _check("triton_fp8")
    layer = layer_suite.Layer(_settings(), "tiny", "uniform")
    assert 0.01 < layer.measure("triton_fp8")["errors"]["y"] < peers.PEERS["triton_fp8"].tolerance


def test_liger_is_called_by_its_signature(monkeypatch):
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32
            assert top_k_weights.dtype == x.dtype
            gate, up = gate_up_proj.chunk(2, dim=1)
            tokens = []
            for t in range(len(x)):
                chosen = zip(top_k_index[t], top_k_weights[t], strict=True)
                tokens.append(sum(w * _swiglu(x[t], gate[e], up[e], down_proj[e]) for e, w in chosen))
            return torch.stack(tokens)

    _module(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=LigerFusedMoEFunction)
    assert not peers.missing("liger")
    assert max(_check("liger").values()) < 1e-5


def test_scattermoe_is_called_by_its_signature(monkeypatch):
    def flatten_sort_count(expert_idxs, num_experts):
        sorted_ids, order = torch.sort(expert_idxs.flatten())
        return sorted_ids, order, sorted_ids.bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs, expert_weights, k, sorted_ids, order, ends, expert_biases=None, gates=None, grouped_in=False,
        grouped_out=False,
    ):  # fmt: skip
        assert ends[-1] == len(order)
        rows = inputs if grouped_in else inputs[order // k]
        out = torch.stack([row @ expert_weights[e] for row, e in zip(rows, sorted_ids, strict=True)])
        if grouped_out:
            return out
        scattered = torch.zeros_like(out).index_copy(0, order, out).view(*gates.shape, -1)
        return (gates[:, None] @ scattered).squeeze(1)

    _module(
        monkeypatch,
        "scattermoe.parallel_experts",
        flatten_sort_count=flatten_sort_count,
        parallel_linear=parallel_linear,
    )
    assert max(_check("scattermoe").values()) < 1e-5


def test_megablocks_is_called_by_its_signature(monkeypatch):
    def sort(ids, end_bit):
        assert ids.dtype == torch.int32
        assert 2**end_bit >= 4
        found = ids.sort()
        return found.values, found.indices

    def gather(x, indices, bin_ids, bins, top_k):
        return x[indices // top_k]

    def scatter(x, indices, bin_ids, weights, bins, top_k):
        flat = torch.zeros_like(x).index_copy(0, indices, x * weights[indices, None])
        return flat.view(-1, top_k, x.shape[1]).sum(1)

    def memory_optimized_grouped_glu(x, w1, v1, w2, batch_sizes, activation_fn):
        assert batch_sizes.device.type == "cpu"
        assert all(each.is_contiguous() for each in (x, w1, v1, w2))
        parts = x.split(batch_sizes.tolist())
        return torch.cat([activation_fn(p @ a.T) * (p @ b.T) @ c for p, a, b, c in zip(parts, w1, v1, w2, strict=True)])

    ops = {"sort": sort, "gather": gather, "scatter": scatter, "histogram": lambda x, n: x.bincount(minlength=n).int()}
    _module(monkeypatch, "megablocks.ops", **ops, inclusive_cumsum=lambda x, dim: x.cumsum(dim))
    _module(monkeypatch, "megablocks.layers.glu", memory_optimized_grouped_glu=memory_optimized_grouped_glu)
    for name in ("megablocks_ops", "grouped_gemm"):
        _module(monkeypatch, name)
    assert peers.missing("megablocks") == "stk"
    _module(monkeypatch, "stk")
    assert not peers.missing("megablocks")
    assert max(_check("megablocks").values()) < 1e-5


def test_sonicmoe_is_called_by_its_signature(monkeypatch):
    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
        is_inference_mode_enabled=False,
    ):  # fmt: skip
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert (token_indices.diff() >= 0).all()
        assert b1 is None
        assert b2 is None
        assert (w1.shape, w2.shape, E) == ((16, 12, 4), (12, 8, 4), 4)
        assert activation_type == "swiglu"
        out = torch.zeros_like(x)
        for t, e, score in zip(token_indices.tolist(), expert_indices.tolist(), router_scores, strict=True):
            rows = w1[:, :, e]  # gate and up in turns
            term = torch.zeros_like(x).index_add(
                0, torch.tensor([t]), score * _swiglu(x[t], rows[::2], rows[1::2], w2[:, :, e])[None]
            )
            out = out + term
        return out, None

    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    _module(monkeypatch, "sonicmoe.enums", ActivationType=types.SimpleNamespace(SWIGLU="swiglu"))
    _module(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs)
    assert max(_check("sonicmoe").values()) < 1e-5


def test_a_peer_that_is_wrong_is_not_timed_and_one_that_raises_is_reported(monkeypatch, tmp_path):
    def raising(*given):
        raise NotImplementedError("only on a Tuesday")

    half = lambda x, w_up, w_down, expert, weight: peers.torch_experts(x, w_up, w_down, expert, weight) / 2
    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(half, ()))
    monkeypatch.setitem(peers.PEERS, "raising", peers.Peer(raising, ()))
    settings = _settings(loads=("uniform",), names=("wrong", "raising"))
    wrong, failed = run(layer_suite.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CPU)
    assert wrong["status"] == "wrong"
    assert "relative error of y 0.5, dx 0.5, dweight 0.5" in wrong["error"]
    assert "both_s" not in wrong
    assert (failed["status"], failed["error"]) == ("failed", "NotImplementedError: only on a Tuesday")


def test_an_output_of_nan_or_of_zeros_is_wrong():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.rand(4, 2, requires_grad=True)
    want = peers.Expected(torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 2))
    for value in (0.0, torch.nan):
        run = lambda x, w_up, w_down, expert, weight, value=value: (x.sum() + weight.sum()) * value + torch.zeros(4, 8)
        with pytest.raises(Wrong):
            peers.check(run, (x, x), (x, torch.zeros(4, 2), weight), torch.ones(4, 8), want)


def test_peers_that_are_not_installed_have_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    settings = _settings(loads=("recorded",), names=("liger", "megablocks"))
    path = tmp_path / "r.jsonl"
    found = run(layer_suite.cases(settings), Rows(path, {}, resume=False), CPU)
    assert [(row["contestant"], row["status"]) for row in found] == [
        ("liger", "absent"), ("megablocks", "absent"), ("every", "absent"),
    ]  # fmt: skip
    assert found[1]["error"] == "megablocks and megablocks_ops and grouped_gemm and stk not installed"
    assert "no recorded counts were given" in found[2]["error"]
    assert len(path.read_text().splitlines()) == 3
    assert all("absent" in layer_suite.cells(row) for row in found)
