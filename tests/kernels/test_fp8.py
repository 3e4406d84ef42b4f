"""What is rounded to which of E4M3's numbers, by brute force over all of them, and read as another library reads it."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from kernels.form import Form
from kernels.fp8 import blocks, operands, quantize, rounded, widen

NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()]  # 0 twice
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _drawn(*shape, dtype=torch.float64):
    """Numbers of many sizes, float32's alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(3 * torch.randn(*shape[:-1], 1, generator=generator)).clamp(max=100)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def _block_scale(block):
    """The smallest power of two, and one that float32 has, under which no number exceeds 448."""
    largest = block.abs().max().item()
    return next(2.0**k for k in range(-126, 128) if largest <= 448 * 2.0**k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 128])
def test_every_number_goes_to_the_nearest_under_the_smallest_scale_that_holds_its_block(rows, dtype):
    x = _drawn(2, 150, 200, dtype=dtype)
    x[0, 0, :128], x[0, 1, 128:] = 0, 1e-7
    x[1, :, 3] = 448 * x[1, :, 3].abs().double().log2().round().clamp(max=6).exp2()  # the last that a scale holds
    values, scales = quantize(x, rows)
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert values.shape == x.shape
    assert scales.shape == (2, 150 if rows == 1 else 2, 2)
    wide, numbers = x.double(), widen(values, scales, torch.float64)
    for e, row, column in ((0, 0, 0), (0, 1, 1), (0, 0, 1), (1, 1, 0), (1, 1, 1)):
        at = (e, slice(row * rows, (row + 1) * rows), slice(column * 128, (column + 1) * 128))
        scale = _block_scale(wide[at])
        assert scales[e, row, column] == scale
        distance = (wide[at][..., None] - NUMBERS * scale).abs()
        error = (numbers[at] - wide[at]).abs()
        assert torch.equal(error, distance.amin(-1))
        # Of two that are as near, the one whose mantissa is even.
        tie = (distance == error[..., None]) & (NUMBERS != 0)
        codes = values[at].view(torch.uint8)
        assert not (codes & 1)[(tie.sum(-1) > 1)].any()


def test_ties_go_to_the_even_mantissa_and_steps_below_two_to_the_minus_six_are_equal():
    x = torch.zeros(1, 128)
    x[0, :6] = torch.tensor([448.0, 17.0, 19.0, 1.5 * 2**-9, 0.5 * 2**-9, 0.51 * 2**-9])
    assert rounded(x, 1)[0, :6].tolist() == [448.0, 16.0, 20.0, 2 * 2**-9, 0.0, 2**-9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 128])
def test_rounding_what_is_rounded_changes_nothing_in_any_type(rows, dtype):
    once = rounded(_drawn(130, 300, dtype=dtype), rows)
    assert torch.equal(rounded(once, rows), once)
    assert torch.equal(rounded(once.double(), rows), once.double())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(value):
    x = torch.ones(3, 200)
    x[1, 130] = value
    assert rounded(x, 1).isnan().any(1).tolist() == [False, True, False]
    assert rounded(x, 1)[1, :128].isfinite().all()


def test_a_checkpoints_weight_and_its_inverse_scales_mean_what_transformers_reads_in_them():
    w = _drawn(256, 384, dtype=torch.float32)
    values, scales = quantize(w, 128)
    assert scales.shape == blocks(w.shape) == (2, 3)
    scales = scales * torch.rand(scales.shape, generator=torch.Generator().manual_seed(0))  # any float32
    want = _dequantize_fp8_weight(values, scales, (128, 128), torch.float32)
    assert torch.equal(widen(values, scales, torch.float32), want)


def test_a_form_says_what_of_a_product_is_rounded():
    x, w = _drawn(5, 200), _drawn(140, 200)
    for fp8, of_x, of_w in (("", x, w), ("activations", rounded(x, 1), w), ("all", rounded(x, 1), rounded(w, 128))):
        got = operands(x, w, Form("swiglu", fp8=fp8))
        assert torch.equal(got[0], of_x)
        assert torch.equal(got[1], of_w)
    assert not torch.equal(x, rounded(x, 1))
