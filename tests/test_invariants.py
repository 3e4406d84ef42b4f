"""What every router with every backend must hold. Exact statements are tested in float64."""

import copy

import pytest
import torch
from torch import nn

from kernels import reference
from moe.config.router import RouterConfig
from moe.model.attention import KVCache
from moe.model.transformer import next_token_loss
from moe.routing.contract import Routing

EXACT = dict(rtol=1e-12, atol=1e-12)


def _x(shape=(2, 9, 12), dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class _Fixed(nn.Module):
    """A router that always decides the same."""

    def __init__(self, expert, weight, token_N, n_tokens, n_experts):
        super().__init__()
        self.n_experts = n_experts
        score_TE = torch.full((n_tokens, n_experts), 1 / n_experts, dtype=torch.float64)
        logits_TE = score_TE.log()
        self.routing = Routing(expert, weight, token_N, logits_TE, logits_TE.logsumexp(-1), score_TE.sum(0))

    def forward(self, x_TD, backend, context):
        return self.routing


def _objective(out, routing):
    """A scalar that every output of the layer feeds."""
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() + routing.aux + routing.z


def _named_gradients(layer, x, backend):
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    _objective(*layer(x, backend)).backward()
    return {"x": x.grad, **{name.removeprefix("_orig_mod."): p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_identical_experts_are_the_dense_mlp_times_the_sum_of_the_weights(make_layer, router, backend, n_experts, k):
    layer = make_layer(router, n_experts=n_experts, k=k)
    up, down = layer.experts.w_up_EFD, layer.experts.w_down_EDF
    with torch.no_grad():
        up[:], down[:] = up[:1].clone(), down[:1].clone()
        x = _x()
        out, routing = layer(x, backend)
        dense = reference.activate(x @ up[0].T, "swiglu") @ down[0].T
        total = routing.weight.sum(-1).view(*x.shape[:2], 1)
    torch.testing.assert_close(out, dense * total, **EXACT)
    if router.renormalize or (router.name == "softmax" and k == n_experts):
        torch.testing.assert_close(out, dense, **EXACT)


def test_every_row_is_counted_once(make_layer, router, backend):
    layer = make_layer(router)
    routing = layer(_x(), backend)[1]
    assert routing.count_E.sum() == 2 * 9 * 3
    assert routing.dropped == 0
    assert routing.count_E.tolist() == [(routing.expert == e).sum().item() for e in range(5)]


FIXED = {  # (expert, weight, token_N, tokens): rows without expert, tokens without rows, experts without rows
    "fixed K with dropped rows": ([[0, -1], [-1, -1], [4, 0]], [[0.5, 9.0], [8.0, 7.0], [1.5, -2.0]], None, 3),
    "ragged": ([2, 2, -1, 0, 4, 2], [1.0, 0.5, 3.0, -1.0, 2.0, 0.25], [1, 1, 1, 3, 3, 4], 6),
    "ragged, all dropped": ([-1, -1], [1.0, 1.0], [0, 2], 3),
    "ragged, no rows": ([], [], [], 3),
    "one hot expert": ([[3]] * 7, [[1.0]] * 7, None, 7),
    "one token": ([[1, 4]], [[0.5, 0.5]], None, 1),
    "no tokens": ([], [], [], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_dropped_rows_are_counted_and_add_nothing(make_layer, backend, case):
    expert, weight, token_N, n_tokens = FIXED[case]
    expert, weight = torch.tensor(expert, dtype=torch.int64), torch.tensor(weight, dtype=torch.float64)
    token_N = None if token_N is None else torch.tensor(token_N, dtype=torch.int64)
    layer = make_layer(RouterConfig())
    layer.router = _Fixed(expert, weight, token_N, n_tokens, 5)
    x = _x((1, n_tokens, 12)).requires_grad_()
    out, routing = layer(x, backend)

    up, down = layer.experts.w_up_EFD, layer.experts.w_down_EDF
    expected = [torch.zeros(12, dtype=torch.float64) for _ in range(n_tokens)]
    rows = zip(*(each.tolist() for each in layer.router.routing.rows()), strict=True)
    for token, e, w in rows:
        if e >= 0:
            expected[token] = expected[token] + w * (reference.activate(x[0, token] @ up[e].T, "swiglu") @ down[e].T)
    if n_tokens:
        torch.testing.assert_close(out[0], torch.stack(expected), **EXACT)
    assert routing.dropped == (expert < 0).sum()
    assert routing.count_E.sum() + routing.dropped == expert.numel()

    out.sum().backward()
    grads = (
        torch.autograd.grad(sum(expected).sum(), (x, up, down)) if (expert >= 0).any() else (0 * x, 0 * up, 0 * down)
    )
    for name, mine, theirs in zip(["x", "up", "down"], (x.grad, up.grad, down.grad), grads, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_named_gradient_is_the_references(make_layer, router, backend, dtype, tolerance, n_shared):
    layer = make_layer(router, dtype, n_shared=n_shared)
    x = _x(dtype=dtype)
    expected = _named_gradients(layer, x, "reference")
    for name, gradient in _named_gradients(layer, x, backend).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert expected[name].norm() > 0, name
        assert error <= tolerance, f"{name}: {error:.2e}"


def test_bf16_gradients_err_no_more_than_twice_the_references(make_layer, router):
    layer = make_layer(router, torch.bfloat16)
    x = _x(dtype=torch.bfloat16)
    exact = _named_gradients(copy.deepcopy(layer).double(), x.double(), "reference")
    loop, fast = (_named_gradients(layer, x, backend) for backend in ("reference", "torch"))
    for name in exact:
        errors = [((each[name].double() - exact[name]).norm() / exact[name].norm()).item() for each in (loop, fast)]
        assert errors[1] <= 2 * errors[0] + 1e-6, f"{name}: {errors}"


def test_gradients_are_the_derivative(make_layer, router, backend):
    layer = make_layer(router, n_experts=3, k=2, d_expert=2)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        out, routing = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, backend))
        return out, routing.aux, routing.z

    inputs = (_x((1, 4, 12)).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_renaming_the_experts_changes_no_output(make_layer, router, backend):
    layer, order = make_layer(router), torch.tensor([3, 0, 4, 1, 2])
    renamed = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in (
            renamed.experts.w_up_EFD,
            renamed.experts.w_down_EDF,
            renamed.router.w_ED,
            renamed.router.bias_E,
        ):
            if tensor is not None:
                tensor.copy_(tensor[order])
    (out, routing), (out_renamed, routing_renamed) = layer(_x(), backend), renamed(_x(), backend)
    torch.testing.assert_close(out_renamed, out, **EXACT)
    torch.testing.assert_close(routing_renamed.aux, routing.aux, **EXACT)
    assert routing_renamed.count_E.tolist() == routing.count_E[order].tolist()


def test_permuting_the_tokens_permutes_the_output(make_layer, router, backend):
    layer, x = make_layer(router), _x((1, 18, 12))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[:, order], backend)[0], layer(x, backend)[0][:, order], **EXACT)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_no_earlier_logit_sees_a_later_token(make_model, router, backend, tokens, position):
    """Exactly for what was chosen and for gradients. A logit may move in its last bits, because matmul may sum in
    another order when an expert's number of rows changes: 1e-13 is allowed, where a real leak is 1e-2."""
    model = make_model(router, position=position)
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    before = model(tokens, backend=backend)
    for last in (1, 6) if backend == "triton" else range(1, tokens.shape[1]):  # interpreted, it is slow
        earlier = before.logits_BSV[:, :last].square().sum()
        (gradient,) = torch.autograd.grad(earlier, embedded[0], retain_graph=True)
        assert (gradient[:, last:] == 0).all()
        assert (gradient[:, :last] != 0).any()
        changed = tokens.clone()
        changed[:, last] = (changed[:, last] + 1 + last) % 17
        after = model(changed, backend=backend)
        for mine, theirs in zip(after.routing, before.routing, strict=True):
            assert torch.equal(mine.expert.view(2, 11, 3)[:, :last], theirs.expert.view(2, 11, 3)[:, :last])
        torch.testing.assert_close(after.logits_BSV[:, :last], before.logits_BSV[:, :last], rtol=0, atol=1e-13)
        assert (after.logits_BSV[:, last:] - before.logits_BSV[:, last:]).abs().max() > 1e-2


def test_a_dense_model_is_causal_to_the_last_bit(make_model, tokens):
    model = make_model(moe=None)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 17
    assert torch.equal(model(changed).logits_BSV[:, :6], model(tokens).logits_BSV[:, :6])


def _loss_and_gradients(model, tokens, **how):
    model.zero_grad()
    out = model(tokens, **how)
    loss = next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:]) + sum(each.aux + each.z for each in out.routing)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rerun_and_activation_checkpointing_change_no_bit(make_model, router, backend, tokens, dtype):
    model = make_model(router, dtype)
    first = _loss_and_gradients(model, tokens, backend=backend)
    for how in ({}, {"checkpoint_activations": True}):
        again = _loss_and_gradients(model, tokens, backend=backend, **how)
        for name in first:
            assert torch.equal(first[name], again[name]), (how, name)


def test_checkpointing_under_autocast_changes_no_bit(make_model, router, backend, tokens):
    model = make_model(router, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first = _loss_and_gradients(model, tokens, backend=backend)
        again = _loss_and_gradients(model, tokens, backend=backend, checkpoint_activations=True)
    for name in first:
        assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_in_one_graph_is_the_same_for_every_routing(make_layer, router, backend):
    layer = make_layer(router, n_experts=3, k=2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    hot = _x()[:, :1].expand(2, 9, 12).contiguous()  # every token to the same experts: others have no row
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (_x(), _x(seed=4), hot):
            expected = _named_gradients(layer, x, backend)
            got = _named_gradients(compiled, x, backend)
            for name in expected:
                torch.testing.assert_close(
                    got[name], expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 8], [4, 1, 6], [11]], ids=str)
def test_cached_logits_are_the_uncached(make_model, router, backend, tokens, position, chunks):
    model = make_model(router, position=position)
    cache = KVCache(model.cfg, batch=2, dtype=torch.float64, device=tokens.device)
    with torch.no_grad():
        whole = model(tokens, backend=backend).logits_BSV
        parts = [model(part, backend=backend, cache=cache).logits_BSV for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert cache.length == 11


@pytest.mark.parametrize("k", range(1, 10))
def test_any_k_up_to_every_expert_matches_the_reference(make_layer, router, backend, k):
    layer = make_layer(router, n_experts=9, k=k)
    torch.testing.assert_close(layer(_x(), backend)[0], layer(_x(), "reference")[0], **EXACT)


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_no_token_and_one_token_are_no_special_case(make_layer, router, backend, n_tokens):
    layer, x = make_layer(router), _x((1, n_tokens, 12))
    gradients = _named_gradients(layer, x, backend)
    assert layer(x, backend)[0].shape == x.shape
    assert all(each.isfinite().all() for each in gradients.values())
    assert layer(x, backend)[1].count_E.sum() == 3 * n_tokens


def test_equal_scores_choose_the_lowest_experts(make_layer, router, backend):
    layer = make_layer(router, n_experts=70, k=5)  # more experts than a sort treats as a small case
    with torch.no_grad():
        layer.router.w_ED.zero_()
        if layer.router.bias_E is not None:
            layer.router.bias_E.zero_()
    assert (layer(_x(), backend)[1].expert == torch.arange(5)).all()


def test_a_shared_expert_adds_its_mlp(make_layer, router, backend):
    layer = make_layer(router, n_shared=3)
    with_shared, shared = layer(_x(), backend)[0], layer.shared
    layer.shared = None
    torch.testing.assert_close(with_shared, layer(_x(), backend)[0] + shared(_x()), **EXACT)
    assert shared.down.weight.shape == (12, 3 * 7)
