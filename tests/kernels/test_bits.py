"""Numbers of few bits in registers: every code, and what torch rounds to it."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import bits, fp8
from tests.kernels.test_plan import DEVICE, poisoned


@triton.jit
def _read(code, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, bits.e4m3(tl.load(code + i)))


@triton.jit
def _written(x, code, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(code + i, bits.to_e4m3(tl.load(x + i)))


def test_every_code_of_e4m3_is_the_number_that_torch_reads_in_it():
    code = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, device=DEVICE)
    _read[(1,)](code, out, N=256)
    torch.testing.assert_close(out, code.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_numbers_are_rounded_as_torch_rounds_them_with_every_tie_and_subnormal():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # the positive ones, up to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [middles.nextafter(torch.tensor(side)) for side in (0.0, 500.0)]
    x = torch.cat((numbers, middles, *beside, torch.tensor([1e-30, 2.0**-149])))
    x = torch.cat((x, -x, torch.zeros(2048 - 2 * len(x)))).to(DEVICE)
    code = torch.empty(2048, dtype=torch.uint8, device=DEVICE)
    _written[(1,)](x, code, N=2048)
    assert torch.equal(code, x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_and_matrices_are_rounded_as_the_definition_rounds_them(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)).to(dtype)
    x = draw(37, 300)
    x[3], x[4, :128], x[5, 130:] = 0, 448, 2.0**-20
    cases = [(x, 1), (draw(1, 3), 1), (draw(3, 200, 170), 128), (draw(2, 170, 200).mT, 128), (draw(0, 64), 1)]
    for tensor, rows in cases:
        with poisoned():
            values, scales = bits.to_fp8(tensor.to(DEVICE), rows)
        want_values, want_scales = fp8.quantize(tensor, rows)
        assert values.is_contiguous()
        assert torch.equal(values.cpu().view(torch.uint8), want_values.view(torch.uint8))
        assert torch.equal(scales.cpu(), want_scales)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_blocks_scale_nan(value):
    x = torch.ones(3, 200, device=DEVICE)
    x[1, 130] = value
    assert bits.to_fp8(x, 1)[1].isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert bits.to_fp8(x[None], 128)[1].isnan().tolist() == [[[False, True]]]
