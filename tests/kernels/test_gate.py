"""The gate against the reference, forward and backward: scores, ties, groups, sizes, types. Infinities and numbers near
them are in test_gate_infinities.py."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import gate as module
from kernels import operands, reference
from kernels.gate import gate
from tests.kernels.test_plan import DEVICE, LastProgram, far_apart, poisoned, untouched

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SCORES = pytest.mark.parametrize("score", operands.SCORES)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))
OUTPUTS = ("weight", "log-sum-exp", "probabilities")
GROUPED = dict(groups=3, k_groups=2, group_top=2)

# (T, E, K), score, with a selection bias, and the rest by name.
CASES = [
    ((7, 5, 3), "softmax", False, {}),
    ((40, 8, 2), "softmax", True, dict(scale=0.7)),
    ((7, 5, 5), "softmax", False, dict(renormalize=False, scale=2.5)),
    ((1, 1, 1), "softmax", True, {}),
    ((7, 2, 1), "softmax", False, {}),
    ((7, 2, 2), "softmax", False, dict(renormalize=False)),
    ((40, 70, 8), "softmax", False, {}),
    ((7, 129, 9), "softmax", True, dict(renormalize=False)),
    ((1, 12, 7), "softmax", False, GROUPED),
    ((7, 12, 8), "softmax", False, dict(groups=3, k_groups=2, group_top=1, scale=0.3)),
    ((40, 12, 4), "softmax", True, GROUPED),
    ((7, 5, 3), "sigmoid", False, {}),
    ((40, 8, 8), "sigmoid", True, dict(scale=2.5)),
    ((1, 5, 1), "sigmoid", False, dict(renormalize=False, scale=0.7)),
    ((7, 1, 1), "sigmoid", False, {}),
    ((7, 70, 6), "sigmoid", True, {}),
    ((7, 129, 5), "sigmoid", False, dict(renormalize=False)),
    ((7, 12, 12), "sigmoid", False, {}),
    ((40, 16, 4), "sigmoid", True, dict(groups=4, k_groups=2, group_top=2)),
    ((7, 16, 5), "sigmoid", False, dict(groups=4, k_groups=3, group_top=1, renormalize=False)),
    ((7, 15, 6), "sigmoid", True, dict(groups=5, k_groups=3, group_top=3)),
    ((7, 70, 8), "sigmoid", False, dict(groups=7, k_groups=3, group_top=2)),
    ((7, 6, 2), "sigmoid", True, dict(groups=6, k_groups=4, group_top=2)),  # groups of one: its best two are one
    ((7, 5, 3), "sqrt_softplus", False, {}),
    ((7, 129, 9), "sqrt_softplus", True, dict(renormalize=False)),
    ((40, 16, 4), "sqrt_softplus", True, dict(groups=4, k_groups=2, group_top=2, scale=1.5)),
    ((7, 70, 17), "softmax", False, {}),  # more than backward reads at once, and no multiple of it
    ((3, 384, 33), "sigmoid", True, dict(groups=32, k_groups=17, group_top=3)),
    ((2, 2048, 64), "sqrt_softplus", True, dict(scale=2.5)),
]


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal numbers, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def gradient(outputs, logits, which=(0, 1, 2)):
    """d(logits) of a weighted sum of the differentiable outputs, or some of them."""
    loss = 0
    for each in which:
        value = outputs[1 + each]
        loss = loss + (value * draw(*value.shape, dtype=value.dtype, seed=each)).sum()
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def both(logits, *arguments, **rest):
    """The same call of the kernel, on poisoned memory, and of the reference in float64."""
    with poisoned():
        got = gate(logits, *arguments, **rest)
    exact = logits.detach().double().requires_grad_()
    return got, reference.gate(exact, *arguments, **rest), exact


@DTYPES
@pytest.mark.parametrize(("sizes", "score", "biased", "rest"), CASES)
def test_every_output_and_gradient_is_the_references(sizes, score, biased, rest, dtype):
    n_tokens, n_experts, k = sizes
    logits = draw(n_tokens, n_experts, dtype=dtype).requires_grad_()
    bias = draw(n_experts, seed=9) / 5 if biased else None
    got, want, exact = both(logits, k, score, bias, **rest)
    assert torch.equal(got[0], want[0])
    assert got[0].dtype == torch.int64
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, mine, theirs in zip(OUTPUTS, got[1:], want[1:], strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    with poisoned():
        mine = gradient(got, logits)
    torch.testing.assert_close(mine.double(), gradient(want, exact), **tolerance)


@pytest.mark.parametrize("output", range(3), ids=OUTPUTS)
@pytest.mark.parametrize("renormalize", [True, False])
@SCORES
def test_each_output_alone_has_the_references_gradient(score, renormalize, output):
    logits = draw(7, 5).requires_grad_()
    got, want, exact = both(logits, 3, score, None, renormalize, 0.7)
    mine = gradient(got, logits, which=(output,))
    torch.testing.assert_close(mine, gradient(want, exact, which=(output,)), rtol=1e-12, atol=1e-13)
    degenerate = score == "softmax" and renormalize and output == 0
    assert degenerate or mine.abs().max() > 1e-3


@SCORES
def test_no_token_gives_empty_outputs_and_no_probability(score):
    logits = draw(0, 5).requires_grad_()
    got = gate(logits, 3, score)
    assert [tuple(each.shape) for each in got] == [(0, 3), (0, 3), (0,), (5,)]
    assert got[3].tolist() == [0] * 5
    assert gradient(got, logits).shape == (0, 5)


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@SCORES
def test_ties_go_to_the_lower_expert(score, biased, dtype):
    logits = torch.tensor([[0.0, 1, 1, 0, 1], [2, 2, 2, 2, 2], [0.0, -0.0, 0.0, -0.0, -1]], dtype=dtype, device=DEVICE)
    expert = gate(logits, 4, score, torch.zeros(5, device=DEVICE) if biased else None)[0]
    assert expert.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_tied_groups_go_to_the_lower_group():
    logits = torch.zeros(1, 12, dtype=torch.float64, device=DEVICE)
    assert gate(logits, 5, "softmax", **GROUPED)[0].tolist() == [[0, 1, 2, 3, 4]]
    logits[0, 8] = logits[0, 0] = 1  # groups 0 and 2, of three
    assert gate(logits, 3, "softmax", groups=3, k_groups=1)[0].tolist() == [[0, 1, 2]]


def _brute_force(row, bias, k, groups, k_groups, group_top):
    """The best K of the best groups by trying every combination: sigmoid scores of one token."""
    value = [1 / (1 + math.exp(-each)) + shift for each, shift in zip(row, bias, strict=True)]
    size = len(row) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    total = lambda some: sum(value[e] for e in some)
    worth = [max(map(total, itertools.combinations(each, group_top))) for each in members]
    kept = max(itertools.combinations(range(groups), k_groups), key=lambda some: sum(worth[g] for g in some))
    allowed = [e for g in kept for e in members[g]]
    return sorted(max(itertools.combinations(allowed, k), key=total), key=lambda e: -value[e])


@pytest.mark.parametrize(
    ("n_experts", "k", "groups", "k_groups", "group_top"),
    [(12, 3, 3, 2, 2), (12, 3, 3, 2, 1), (12, 4, 3, 1, 4), (16, 4, 4, 2, 2), (10, 3, 5, 2, 1), (14, 5, 2, 1, 3)],
)
def test_a_group_limited_choice_is_the_best_of_all_combinations(n_experts, k, groups, k_groups, group_top):
    logits, bias = draw(40, n_experts), draw(n_experts, seed=1) / 20
    expert = gate(logits, k, "sigmoid", bias, True, 1.0, groups, k_groups, group_top)[0]
    rows = [_brute_force(row, bias.tolist(), k, groups, k_groups, group_top) for row in logits.tolist()]
    assert expert.tolist() == rows
    assert rows != gate(logits, k, "sigmoid", bias)[0].tolist()  # the groups matter


def test_a_bias_that_wants_a_gradient_gets_none_as_from_the_reference():
    bias = draw(5).requires_grad_()
    assert not any(each.requires_grad for each in gate(draw(3, 5), 2, "sigmoid", bias))
    assert not any(each.requires_grad for each in reference.gate(draw(3, 5), 2, "sigmoid", bias))


def test_strided_logits_and_gradients_change_nothing():
    strided = draw(7, 5).mT.contiguous().mT.requires_grad_()
    got, want, exact = both(strided, 3, "sigmoid")
    dout = draw(3, 7).mT
    ones = torch.ones((), dtype=torch.float64, device=DEVICE)
    gradients = [dout, ones.expand(7), ones.expand(5)]
    mine, theirs = torch.autograd.grad(got[1:], strided, gradients), torch.autograd.grad(want[1:], exact, gradients)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_reruns_are_bitwise_equal():
    logits = draw(100, 12, dtype=torch.float32).requires_grad_()
    first, second = (gate(logits, 4, "sigmoid", **GROUPED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(gradient(first, logits), gradient(second, logits))


def test_a_second_derivative_is_refused():
    logits = draw(3, 5).requires_grad_()
    (dlogits,) = torch.autograd.grad(gate(logits, 2, "softmax")[1].square().sum(), logits, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"^dispatch=triton has no second derivative; dispatch=reference does"
    ):
        dlogits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choose", [reference.gate, gate], ids=["reference", "triton"])
@pytest.mark.parametrize(("score", "rest"), [("softmax", {}), ("sigmoid", GROUPED), ("sqrt_softplus", GROUPED)])
def test_logits_of_16_bits_give_what_the_same_numbers_give_in_float32(score, rest, choose, dtype):
    narrow = (3 * draw(40, 12)).to(dtype).requires_grad_()
    same = narrow.detach().float().requires_grad_()
    got, want = (choose(logits, 4, score, draw(12, seed=9).float() / 5, **rest) for logits in (narrow, same))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.equal(theirs)  # bit for bit, in float32
        assert mine.dtype == theirs.dtype
    mine, theirs = gradient(got, narrow), gradient(want, same)
    assert mine.dtype == dtype
    unit = torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(mine.float(), theirs, rtol=unit, atol=unit * torch.finfo(dtype).tiny)


@pytest.mark.parametrize("choose", [reference.gate, gate], ids=["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64])
def test_other_dtypes_are_refused(dtype, choose):
    accepted = rf"takes logits and a bias in one of bfloat16, float16, float32, float64; they are {dtype}, None\."
    with pytest.raises(ValueError, match=accepted):
        choose(torch.zeros(2, 3, device=DEVICE).to(dtype), 1, "softmax")


@pytest.mark.parametrize(("k", "groups", "k_groups"), [(13, 1, 1), (0, 1, 1), (5, 3, 1), (1, 5, 1)])
def test_a_choice_that_cannot_be_made_is_refused(k, groups, k_groups):
    sentence = f"^k={k} cannot be chosen in {k_groups} of {groups} equal groups of 12 experts"
    with pytest.raises(ValueError, match=sentence):
        gate(torch.zeros(2, 12, device=DEVICE), k, "softmax", groups=groups, k_groups=k_groups)


@SCORES
def test_opcheck_passes(score):
    logits = draw(7, 12)
    forward = (logits, 3, score, draw(12), True, 0.7, 3, 2, 2)
    assert set(torch.library.opcheck(module._forward, forward).values()) == {"SUCCESS"}
    expert, *outputs = module._forward(*forward)
    backward = (logits, expert, *map(torch.randn_like, outputs), score, True, 0.7)
    assert set(torch.library.opcheck(module._backward, backward).values()) == {"SUCCESS"}
    # With a gradient opcheck's last part cannot add up outputs of which the first are integers; the next test can.
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks = torch.library.opcheck(module._forward, (logits.requires_grad_(), *forward[1:]), test_utils=parts)
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_in_one_graph_it_gives_the_same():
    function = lambda logits: gate(logits.tanh(), 3, "sigmoid", None, True, 0.7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            logits = draw(7, 12, seed=seed).requires_grad_()
            outputs = [each(logits) for each in (function, compiled)]
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
            assert torch.equal(*(gradient(each, logits) for each in outputs))


@SCORES
def test_rows_past_two_to_the_31_logits_are_read_and_written(score, monkeypatch):
    for name in ("_gate", "_gate_backward"):
        monkeypatch.setattr(module, name, LastProgram(getattr(module, name)))
    n_tokens = 2**31 // 64 + 1
    with far_apart():
        logits = untouched(n_tokens, 64, dtype=torch.float32)
        logits[-1] = row = draw(64, dtype=torch.float32)
        expert, weight, lse, _ = module._forward(logits, 1, score, None, False, 1.0, 1, 1, 2)
        ones = untouched(n_tokens, 1, dtype=torch.float32)
        ones[-1] = 1
        dlogits = module._backward(logits, expert, ones, ones[:, 0], draw(64, dtype=torch.float32), score, False, 1.0)
        near = row[None].clone().requires_grad_()
        outputs = gate(near, 1, score, renormalize=False)
        want = torch.autograd.grad(outputs[1:], near, [ones[-1:], ones[-1], draw(64, dtype=torch.float32)])[0]
    assert [expert[-1].item(), weight[-1].item(), lse[-1].item()] == [each.item() for each in outputs[:3]]
    assert torch.equal(dlogits[-1:], want)


@settings(max_examples=40)
@given(st.data())
def test_any_small_choice_is_the_references(data):
    each, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    k_groups = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, k_groups * each))
    numbers = st.sampled_from([-3.0, -1.0, 0.0, 0.25, 1.5, 2.0])
    row = st.lists(numbers, min_size=each * groups, max_size=each * groups)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float64, device=DEVICE)
    bias = data.draw(st.none() | row)
    arguments = (
        k, data.draw(st.sampled_from(operands.SCORES)),
        None if bias is None else torch.tensor(bias, dtype=torch.float64, device=DEVICE),
        data.draw(st.booleans()), 0.7, groups, k_groups, data.draw(st.integers(1, each)),
    )  # fmt: skip
    got, want, exact = both(logits.requires_grad_(), *arguments)
    assert torch.equal(got[0], want[0])
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(got, logits), gradient(want, exact), rtol=1e-12, atol=1e-12)


IN_FLOAT64 = """
import re, torch
from kernels import aot, gate, operands
new = lambda *shape: torch.empty(shape, dtype=torch.float64, device="meta")
with aot.compiling("sm_90") as launches:
    for score in operands.SCORES:
        outputs = gate._forward._init_fn(new(64, 12), 3, score, new(12), True, 0.7, 3, 2, 2)
        gate._backward._init_fn(new(64, 12), *outputs, score, True, 0.7)
print(len(launches), sum(len(re.findall(r"\\bf32\\b", each.kernel.asm["ttir"])) for each in launches))
"""


def test_compiled_for_float64_nothing_is_float32():
    """A float argument of a kernel would be: the interpreter keeps it a float64."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", IN_FLOAT64],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "0"]
