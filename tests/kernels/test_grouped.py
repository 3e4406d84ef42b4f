"""The grouped experts against the reference, and what torch.library, autograd and compile ask of a custom op."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped, reference
from kernels.form import form_of

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2", "swiglu_clipped")
DIFFERENTIABLE = ("x", "w_up", "w_down", "weight")


def _arguments(token, expert, n_tokens=6, n_experts=5, d=4, f=3, activation="swiglu", dtype=torch.float64, seed=0):
    """Everything `experts` takes, by name, drawn at random around the given rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return {
        "x": draw(n_tokens, d),
        "w_up": draw(n_experts, 2 * f if activation.startswith("swiglu") else f, d),
        "w_down": draw(n_experts, d, f),
        "token": torch.tensor(token, dtype=torch.int64),
        "expert": torch.tensor(expert, dtype=torch.int64),
        "weight": draw(len(token)),
        "activation": activation,
    }


def _ops(arguments, biases=(None, None), wanted=(True,) * 4 + (False,) * 2):
    """The arguments of the forward op and of the backward op."""
    wanted = list(wanted)
    x, up, down, token, expert, weight, activation = arguments.values()
    slot, offset, n_slots = grouped.slots(expert, len(up))
    form = form_of(activation)
    forward = (x, up, down, weight, *biases, token, slot, offset, n_slots, *form, True)
    z = grouped._forward(*forward)[1]
    backward = (torch.randn_like(x), x, z, up, down, weight, *biases, token, slot, offset, *form, wanted)
    return forward, tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in backward)


ROWS = ([0, 0, 1, 3, 3, 3, 5], [2, 0, -1, 2, 2, 4, 0])  # token 2 and 4, experts 1 and 3 have no row


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4)), max_size=24),
    st.sampled_from((1, 2, 5, 20)),  # many rows leave empty slots between experts
    st.sampled_from(ACTIVATIONS),
)
def test_output_and_gradients_are_the_references_for_any_rows(rows, times, activation):
    rows = sorted(rows * times, key=lambda row: row[0])
    arguments = _arguments([t for t, _ in rows], [e for _, e in rows], activation=activation)
    inputs = [arguments[name] for name in DIFFERENTIABLE]
    expected, got = (f.experts(*arguments.values()) for f in (reference, grouped))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    dout = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    mine = torch.autograd.grad(got, inputs, dout)
    theirs = torch.autograd.grad(expected, inputs, dout, allow_unused=True, materialize_grads=True) if rows else mine
    for name, a, b in zip(DIFFERENTIABLE, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=200)
@given(st.lists(st.integers(-1, 4), max_size=40), st.sampled_from((1, 3, 10, 60)))
def test_slots_keep_the_plans_order_and_start_experts_at_multiples(expert, times):
    expert_N = torch.tensor(expert * times, dtype=torch.int64)
    slot_N, offset_E1, n_slots = grouped.slots(expert_N, 5)
    mean = len(expert_N) / 5
    align = max(power for power in (1, 2, 4, 8, 16, 32) if power == 1 or power * 8 <= mean)
    count = [(expert_N == e).sum().item() for e in range(5)]
    start = 0
    for e in range(5):
        assert offset_E1[e] == start
        assert slot_N[expert_N == e].tolist() == list(range(start, start + count[e]))
        start += -(-count[e] // align) * align
    assert offset_E1[5] == start
    assert slot_N[expert_N < 0].tolist() == list(range(start, start + len(expert_N) - sum(count)))
    assert all(each < n_slots for each in slot_N.tolist())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_the_derivative(activation):
    token, expert = ROWS
    arguments = _arguments(token, expert, activation=activation)
    function = lambda *inputs: grouped.experts(
        *{**arguments, **dict(zip(DIFFERENTIABLE, inputs, strict=True))}.values()
    )
    assert torch.autograd.gradcheck(function, [arguments[name] for name in DIFFERENTIABLE])


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_opcheck_passes(op, activation):
    arguments = _arguments(*ROWS, activation=activation)
    biases = [torch.ones(arguments[name].shape[:2], dtype=torch.float64) for name in ("w_up", "w_down")]
    for some in (_ops(arguments), _ops(arguments, biases, (True, False, False, True, True, True))):
        function, operands = (grouped._forward, some[0]) if op == "forward" else (grouped._backward, some[1])
        assert set(torch.library.opcheck(function, operands).values()) == {"SUCCESS"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("times", [1, 20])
def test_with_biases_output_and_gradients_are_the_references_where_some_are_clipped(activation, times):
    token, expert = (torch.tensor(rows).repeat_interleave(times) for rows in ROWS)
    arguments = _arguments(token.tolist(), expert.tolist(), activation=activation)
    arguments["x"] = (6 * arguments["x"]).detach().requires_grad_()
    biases = [
        torch.randn(arguments[name].shape[:2], dtype=torch.float64, requires_grad=True) for name in ("w_up", "w_down")
    ]
    inputs = [*(arguments[name] for name in DIFFERENTIABLE), *biases]
    expected, got = (f.experts(*arguments.values(), *biases) for f in (reference, grouped))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for out in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for bias, gradient in zip(biases, mine[-2:], strict=True):  # the others frozen or not
        assert torch.equal(torch.autograd.grad(got.square().sum(), bias, retain_graph=True)[0], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        floats = {name: each.float() if torch.is_tensor(each) and each.is_floating_point() else each
                  for name, each in arguments.items()}  # fmt: skip
        rounded = grouped.experts(*floats.values(), *(bias.float() for bias in biases))
    assert (rounded - expected).norm() / expected.norm() < 0.03


N_MATMULS = {"x": 1, "w_up": 1, "w_down": 1, "weight": 0}  # per expert with rows, beside that for the gradient of h


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("n_wanted", [1, 2, 3, 4])
def test_what_is_frozen_costs_no_matmul_and_leaves_the_other_gradients_bitwise(monkeypatch, n_wanted, activation):
    arguments, calls, mm = _arguments(*ROWS, activation=activation), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **out: calls.append(args) or mm(*args, **out))
    gradients = lambda out, names: torch.autograd.grad(out.square().sum(), [arguments[name] for name in names])
    whole = dict(zip(DIFFERENTIABLE, gradients(grouped.experts(*arguments.values()), DIFFERENTIABLE), strict=True))
    for wanted in itertools.combinations(DIFFERENTIABLE, n_wanted):
        frozen = {k: v.detach() if k in DIFFERENTIABLE and k not in wanted else v for k, v in arguments.items()}
        out = grouped.experts(*frozen.values())
        calls.clear()
        got = gradients(out, wanted)
        assert len(calls) == 3 * (sum(N_MATMULS[name] for name in wanted) + (wanted != ("w_down",)))
        assert all(torch.equal(each, whole[name]) for name, each in zip(wanted, got, strict=True))


def test_without_a_gradient_z_is_not_kept_and_the_output_is_bitwise_the_same(monkeypatch):
    arguments, kept, forward = _arguments(*ROWS), [], grouped._forward
    monkeypatch.setattr(grouped, "_forward", lambda *args: kept.append(out := forward(*args)) or out)
    grouped.experts(*arguments.values())
    with torch.no_grad():
        grouped.experts(*arguments.values())
    frozen = {k: v.detach() if k in DIFFERENTIABLE else v for k, v in arguments.items()}
    grouped.experts(*frozen.values())
    assert [len(z) > 0 for _, z in kept] == [True, False, False]
    assert all(torch.equal(out, kept[0][0]) for out, _ in kept)


def test_saved_for_backward_are_x_z_the_weights_and_the_routing_only():
    token, expert = ROWS
    arguments = _arguments(token, expert, d=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        grouped.experts(*arguments.values())
    n = len(token)
    floats = sorted(tuple(each.shape) for each in saved if each.is_floating_point())
    assert floats == sorted([(6, 16), (n, 6), (5, 6, 16), (5, 16, 3), (n,)])
    assert sorted(tuple(each.shape) for each in saved if not each.is_floating_point()) == [(6,), (n,), (n,)]
    shared = {each.data_ptr() for each in saved}
    assert all(arguments[name].data_ptr() in shared for name in ("x", "w_up", "w_down", "weight"))  # no copies


def test_a_second_derivative_is_refused():
    arguments = _arguments(*ROWS)
    (gradient,) = torch.autograd.grad(
        grouped.experts(*arguments.values()).square().sum(), arguments["x"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_an_expert_without_rows_has_a_gradient_of_zero():
    arguments = _arguments(*ROWS)
    grouped.experts(*arguments.values()).sum().backward()
    for e in (1, 3):
        assert (arguments["w_up"].grad[e] == 0).all()
        assert (arguments["w_down"].grad[e] == 0).all()
    assert (arguments["x"].grad[[1, 2, 4]] == 0).all()  # a dropped row, no row, no row
    assert arguments["weight"].grad[2] == 0


def test_strided_inputs_and_gradients_change_nothing():
    token, expert = ROWS
    plain, strided = _arguments(token, expert, d=4), _arguments(token, expert, d=4)
    for name in ("x", "w_up", "w_down"):
        strided[name] = strided[name].detach().mT.contiguous().mT.requires_grad_()
    for each in (plain, strided):
        grouped.experts(*each.values()).sum().backward()  # the gradient of a sum is an expanded scalar
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(strided[name].grad, plain[name].grad, rtol=1e-13, atol=1e-13)


def test_a_tokens_rows_are_summed_in_float32():
    n = 300  # in bf16, 256 + 1 is 256
    x, up = torch.ones(1, 2, dtype=torch.bfloat16), torch.full((1, 1, 2), 0.5, dtype=torch.bfloat16)
    down, row = torch.ones(1, 2, 1, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64)
    out = grouped.experts(x, up, down, row, row, torch.ones(n), "relu2")
    assert out.tolist() == [[300.0, 300.0]]


def test_autocast_rounds_the_inputs_and_returns_float32_gradients():
    arguments = _arguments(*ROWS, dtype=torch.float32)
    rounded = {
        name: value.detach().bfloat16() if name in ("x", "w_up", "w_down") else value
        for name, value in arguments.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped.experts(*arguments.values())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, grouped.experts(*rounded.values()))
    out.sum().backward()
    assert {arguments[name].grad.dtype for name in DIFFERENTIABLE} == {torch.float32}
