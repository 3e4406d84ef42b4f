"""What becomes of a tile: derivatives are those of the values, whole and cut off; slices of columns are the columns."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.epilogue import activate, columns, gated
from kernels.form import Form
from tests.kernels.test_plan import DEVICE


@triton.jit
def _gated(gate, up, out, N: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    n = tl.arange(0, N)
    value, for_gate, for_up = gated(tl.load(gate + n), tl.load(up + n), ALPHA, LIMIT, SHIFT)
    tl.store(out + n, value)
    tl.store(out + N + n, for_gate)
    tl.store(out + 2 * N + n, for_up)


@triton.jit
def _activate(z, out, N: tl.constexpr, ACTIVATION: tl.constexpr):
    n = tl.arange(0, N)
    value, slope = activate(tl.load(z + n), ACTIVATION)
    tl.store(out + n, value)
    tl.store(out + N + n, slope)


@triton.jit
def _columns(x, out, ROWS: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    slices = columns(tl.load(x + row * N + tl.arange(0, N)[None, :]), PARTS)
    WIDTH: tl.constexpr = N // PARTS
    for part in tl.static_range(PARTS):
        tl.store(out + row * N + part * WIDTH + tl.arange(0, WIDTH)[None, :], slices[part])


def _numbers(n, seed):
    return 4 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("alpha", "limit", "shift"), [(1.0, 0.0, 0.0), (1.702, 7.0, 1.0), (0.7, 0.0, 0.0), (1.0, 2.0, 0.0), (1.0, 0.0, 2.0)]
)
def test_swiglus_value_and_derivatives_are_the_references(alpha, limit, shift):
    gate, up = _numbers(64, 0), _numbers(64, 1)
    gate[:2], up[2:5] = torch.tensor([torch.nan, 30.0]), torch.tensor([torch.nan, 30.0, -30.0])
    out = torch.empty(3, 64, dtype=torch.float64, device=DEVICE)
    _gated[(1,)](gate, up, out, 64, alpha, limit, shift)
    z = torch.stack([gate, up], 1).requires_grad_()
    value = reference.activate(z, Form("swiglu", True, alpha, limit, shift)).squeeze(1)
    (dz,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(out[0], value.detach(), rtol=1e-13, atol=1e-13, equal_nan=True)
    finite = ~z.detach().isnan().any(1)
    torch.testing.assert_close(out[1:, finite], dz.T[:, finite], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2"])
def test_an_ungated_value_and_its_derivative_are_the_references(activation):
    z = _numbers(64, 0).requires_grad_()
    out = torch.empty(2, 64, dtype=torch.float64, device=DEVICE)
    _activate[(1,)](z.detach(), out, 64, activation)
    value = reference.activate(z, activation)
    torch.testing.assert_close(out[0], value.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[1], torch.autograd.grad(value.sum(), z)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_slices_of_columns_are_the_columns_in_their_order(parts):
    x = torch.arange(4 * 16, dtype=torch.float64, device=DEVICE).view(4, 16)
    out = torch.full_like(x, torch.nan)
    _columns[(1,)](x, out, 4, 16, parts)
    assert torch.equal(out, x)
