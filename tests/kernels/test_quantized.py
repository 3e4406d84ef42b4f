"""Quantised weights: what is rounded to what, by brute force over every code and by two other libraries; and the layer
on the kernels against the reference on dequantised weights."""

import warnings
import weakref
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels import grouped, ragged_mm, tuning
from kernels.form import NAMED, Form
from kernels.quantized import (
    E2M1,
    FORMATS,
    Mxfp4,
    Widening,
    dequantize,
    experts,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp4,
)
from tests.kernels.small_experts import call, layer_arguments, run_rows
from tests.kernels.test_plan import DEVICE, LOADS, poisoned
from tests.kernels.test_ragged_mm import Spy

ROOT = Path(__file__).parents[2]
CODES = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)


def _drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_int8_is_the_nearest_of_its_255_steps_and_off_by_half_a_step_at_most():
    w = _drawn(3, 4, 50) * 10.0 ** torch.arange(-2, 2)[:, None]
    got = quantize_int8(w)
    assert got.values.dtype == torch.int8
    assert got.scales.dtype == torch.float32
    assert (got.values.abs().amax(-1) == 127).all()
    steps = torch.arange(-127, 128) * got.scales.double()[..., None]
    nearest = (w[..., None] - steps[:, :, None]).abs().amin(-1)
    error = (w - dequantize(got, torch.float64)).abs()
    assert torch.equal(error, nearest)
    # A scale that float32 rounded down leaves the largest weight past the last step, by a rounding's worth.
    assert (error <= got.scales.double()[..., None] * (0.5 + 127 * 2**-24)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    w = _drawn(1, 2, 64)
    w[0, 0, :32], w[0, 1] = 0, 0
    got = dequantize(FORMATS[name](w), torch.float64)
    assert not got[0, 0, :32].any()
    assert not got[0, 1].any()
    assert got[0, 0, 32:].any()


def test_every_number_of_mxfp4_under_every_scale_comes_back_with_its_code_and_its_scale():
    codes, scales = torch.arange(16, dtype=torch.uint8).repeat(2), torch.arange(255, dtype=torch.uint8)
    values = (codes[::2] | codes[1::2] << 4).expand(1, 255, 1, 16).contiguous()
    stored = Mxfp4(values, scales.view(1, 255, 1))
    w = dequantize(stored, torch.float64)
    want = CODES[codes.int()] * torch.tensor([2.0 ** (s - 127) for s in range(255)], dtype=torch.float64)[:, None]
    assert torch.equal(w[0], want)
    again = quantize_mxfp4(w)
    assert torch.equal(again.values, values)
    assert torch.equal(again.scales, stored.scales)
    assert dequantize(stored._replace(scales=stored.scales.clone().fill_(255))).isnan().all()


def test_mxfp4_is_the_nearest_of_its_16_numbers_with_ties_to_even_and_saturated_at_6():
    """The group's largest is 4 to 8 times its scale: drawn ones, every tie, subnormals, and what lies beyond 6."""
    w = torch.cat((_drawn(1, 8, 32), torch.zeros(1, 1, 32, dtype=torch.float64)), 1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 0.2, 0.3, 5.1, 6.9, 7.0, 7.9, 4.0, 0.0])
    w[0, 8] = torch.cat((ties, -ties)).double()
    scale = 2.0 ** (w.abs().amax(-1, keepdim=True).log2().floor() - 2)
    distance = ((w / scale)[..., None] - CODES).abs()
    distance += (torch.arange(16) % 2) * 1e-12  # an even code wins a tie
    want = CODES[distance.argmin(-1)] * scale
    got = dequantize(quantize_mxfp4(w), torch.float64)
    assert torch.equal(got, want)
    listed = [0, 1, 1, 2, 2, 4, 4, 0.5, 0, 0.5, 6, 6, 6, 6, 4, 0]
    assert got[0, 8].tolist() == [*listed, *(-value for value in listed)]


def test_mxfp4_quantises_as_gguf_does():
    w = _drawn(1, 16, 96).float().numpy() * np.logspace(-6, 6, 16, dtype=np.float32)[:, None]
    kind = gguf.GGMLQuantizationType.MXFP4
    want = torch.from_numpy(gguf.dequantize(gguf.quantize(w[0], kind), kind))
    assert torch.equal(dequantize(quantize_mxfp4(torch.from_numpy(w)))[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoints_blocks_and_scales_mean_what_transformers_reads_in_them(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(20, 230, (3, 10, 4), dtype=torch.uint8, generator=generator)
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # stored by columns
    assert torch.equal(dequantize(Mxfp4(blocks, scales), dtype), want.mT)


def _layer(formats=("mxfp4", "mxfp4"), load="zipf", d=96, f=32, **rest):
    """A layer's arguments with w_up and w_down in these formats."""
    arguments = layer_arguments(LOADS[load] if isinstance(load, str) else load, d=d, f=f, **rest)
    for key, name in zip(("w_up", "w_down"), formats, strict=True):
        arguments[key] = FORMATS[name](arguments[key].detach())
    return {key: value.detach() if torch.is_tensor(value) else value for key, value in arguments.items()}


def _wide(arguments):
    return {key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in arguments.items()}  # fmt: skip


def _error(arguments, dispatch):
    """Relative Frobenius error of a backend's output, against the reference in float64; counts must be the same."""
    want, count = call(experts, _wide(arguments), dispatch="reference")
    with poisoned():
        got, counted = call(experts, arguments, dispatch=dispatch)
    assert torch.equal(count, counted)
    assert got.dtype == arguments["x"].dtype
    return ((got.double() - want).norm() / want.norm()).item() if want.any() else got.double().norm().item()


FORMS = {"swiglu": Form("swiglu"), "gpt-oss": NAMED["swiglu_clipped"], "relu2": Form("relu2")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "formats",
    [("int8", "int8"), ("mxfp4", "mxfp4"), ("fp8", "fp8"), ("int8", "mxfp4"), ("mxfp4", "fp8"), ("fp8", "int8")],
    ids="-".join,
)
def test_every_backend_computes_the_layer_of_the_dequantised_weights(formats, form):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        arguments = _layer(formats, form=FORMS[form], biased=True, dtype=dtype)
        for dispatch in ("reference", "torch", "triton"):
            assert _error(arguments, dispatch) < bound


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_kernels_are_as_wrong_as_any(dtype, name):
    """Twice the torch backend's error, and twice that for the interpreter, which truncates bfloat16."""
    arguments = _layer((name, name), dtype=dtype)
    factor = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
    assert _error(arguments, "triton") <= factor * _error(arguments, "torch")


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", FORMATS)
def test_any_load_is_right(name, load):
    assert _error(_layer((name, name), load=load, form=Form("swiglu", weigh_input=True)), "triton") < 1e-14


@pytest.mark.parametrize(
    ("name", "d", "f"),
    [("int8", 3, 17), ("int8", 33, 5), ("mxfp4", 32, 96), ("mxfp4", 160, 64), ("fp8", 3, 17), ("fp8", 140, 36)],
)  # fmt: skip
def test_sizes_that_fill_no_tile_are_right(name, d, f):
    for tile in ({}, {"block_k": 16}, {"block_k": 128, "block_n": 64}):
        changed = lambda *given, looked_up=tuning.tile, tile=tile, **rest: looked_up(*given, **rest)._replace(**tile)
        with patch.object(tuning, "tile", changed):
            assert _error(_layer((name, name), d=d, f=f), "triton") < 1e-14


def test_rows_listed_with_their_tokens_and_no_row_at_all_are_right():
    token, expert = [0, 0, 2, 3, 3, 3, 5], [1, 4, 4, 0, -1, 1, 2]
    assert _error(_layer(load=expert, token=token, n_tokens=6), "triton") < 1e-14
    arguments = _layer()
    nothing = {key: arguments[key][:0] for key in ("x", "expert", "weight")}
    out_TD, count_E = call(experts, {**arguments, **nothing})
    assert (out_TD.shape, count_E.tolist()) == ((0, 96), [0] * 5)


def test_the_smallest_scale_is_exact_and_a_scale_of_nan_stays_in_its_experts_rows():
    arguments = _layer(load="even", form="relu2")
    arguments["w_up"].scales[:] = 0
    arguments["x"] *= 2.0**130
    assert _error(arguments, "triton") < 1e-14
    for name in ("w_up", "w_down"):
        arguments[name].values.fill_(0x22)  # ones: of positive numbers alone, an infinite scale would give no NaN
    arguments["x"].abs_()
    arguments["w_down"].scales[2] = 255
    out_TD, _ = call(experts, arguments)
    assert out_TD.isnan().any(1).tolist() == [2 in row for row in LOADS["even"]]


def test_what_is_read_of_weights_is_a_half_and_a_little_over_a_quarter_of_16_bits():
    bits = {}
    for name in FORMATS:
        arguments, spy = _layer((name, name), d=64, f=128), Spy(ragged_mm._ragged_mm)
        with patch.object(ragged_mm, "_ragged_mm", spy):
            call(experts, arguments)
        for w, given, constants in zip(
            (arguments["w_up"], arguments["w_down"]), spy.arguments, spy.launches, strict=True
        ):
            read = [given[1], given[-2]]  # no other operand is as large as weights are
            assert [tensor.data_ptr() for tensor in read] == [tensor.data_ptr() for tensor in w]
            assert constants["QUANT"] == name
            bits[name, w.shape[-1]] = 8 * sum(tensor.nbytes for tensor in read) / w.shape.numel()
    want = {("int8", 64): 8.5, ("int8", 128): 8.25, ("mxfp4", 64): 4.25, ("mxfp4", 128): 4.25}
    # A block of 128 by 128 that is not full: 256 by 64 weights have two, 64 by 128 have one.
    assert bits == want | {("fp8", 64): 8 + 2 * 32 / (256 * 64), ("fp8", 128): 8 + 32 / (64 * 128)}


@pytest.mark.parametrize("dispatch", ["reference", "torch", "triton"])
def test_a_compiled_graph_holds_the_layer_without_a_warning(dispatch):
    arguments = _layer(dtype=torch.float32)
    layer = lambda x: call(experts, {**arguments, "x": x}, dispatch=dispatch)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.compile(layer, fullgraph=True, backend="eager")(arguments["x"])
    for tensor, want in zip(got, layer(arguments["x"]), strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dispatch", ["reference", "torch"])
def test_no_more_than_one_matrix_is_wide_at_a_time(dispatch, name):
    """Each is dropped before the next one is made; nothing as large as a stack is."""
    arguments, alive, most = _layer((name, name), d=96, f=64, dtype=torch.float32), [], [0]
    real = Widening.__getitem__

    def widened(stack, e):
        w_NM = real(stack, e)
        alive.append(weakref.ref(w_NM))
        most[0] = max(most[0], sum(made() is not None for made in alive))
        return w_NM

    with patch.object(Widening, "__getitem__", widened):
        call(experts, arguments, dispatch=dispatch)
    assert len(alive) > 5
    assert most[0] <= 2, "the one that was asked for, and the one that it takes the place of"


@pytest.mark.parametrize(("name", "form", "error"), [
    ("int8", Form("swiglu"), 0.013), ("fp8", Form("swiglu"), 0.047), ("fp8", Form("swiglu", fp8="all"), 0.066),
    ("mxfp4", Form("swiglu"), 0.20),
], ids=["int8", "fp8", "fp8 and its activations", "mxfp4"])  # fmt: skip
def test_how_far_a_format_takes_a_layer_of_normal_numbers(name, form, error):
    """As docs/kernels.md has it: relative Frobenius error of the output."""
    expert = torch.randint(0, 8, (512, 2), generator=torch.Generator().manual_seed(0))
    arguments = _layer((name, name), load=expert, n_experts=8, d=512, f=256)
    wide = layer_arguments(expert, n_experts=8, d=512, f=256)
    want = run_rows(wide, grouped.experts)["out"]
    got, _ = call(experts, {**arguments, "form": form}, dispatch="torch")
    assert ((got - want).norm() / want.norm()).item() == pytest.approx(error, rel=0.05)


SMALL = _layer(dtype=torch.float32)
UP, DOWN = SMALL["w_up"], SMALL["w_down"]
EIGHT = quantize_int8(torch.zeros(5, 64, 96, device=DEVICE))
FP8 = quantize_fp8(torch.zeros(5, 64, 96, device=DEVICE))
REFUSED = {
    "a gradient wanted": ({"x": SMALL["x"].clone().requires_grad_()}, "call it under torch.no_grad()"),
    "ordinary weights": ({"w_up": torch.zeros(5, 64, 96)}, "takes w_up as Int8, Mxfp4 or Fp8; it is Tensor."),
    "scales of fewer groups": ({"w_up": UP._replace(scales=UP.scales[..., :2].contiguous())}, "(5, 64, 2)"),
    "scales in float32": ({"w_down": DOWN._replace(scales=DOWN.scales.float())}, "takes w_down.scales in uint8"),
    "values in uint8": ({"w_up": EIGHT._replace(values=EIGHT.values.to(torch.uint8))}, "takes w_up.values in int8"),
    "a scale for each weight": ({"w_up": EIGHT._replace(scales=EIGHT.values.float())}, "(5, 64, 96)"),
    "half the bytes": ({"w_up": UP._replace(values=UP.values[..., :8].contiguous())}, "with 16 bytes to a scale"),
    "a scale for each row": ({"w_up": FP8._replace(scales=EIGHT.scales[..., None])}, "(E, 1, 1), a scale for 128 by"),
    "fp8 in bytes": ({"w_up": FP8._replace(values=FP8.values.view(torch.uint8))}, "takes w_up.values in float8_e4m3fn"),
    "activations alone in 8 bits": ({"form": Form("swiglu", fp8="all")}, "for weights in fp8; w_up is Mxfp4."),
    "values with gaps": ({"w_up": UP._replace(values=UP.values.mT.contiguous().mT)}, "takes contiguous operands"),
    "another D": ({"x": SMALL["x"][:, :80].contiguous()}, "they are (24, 80), (5, 64, 96), (5, 96, 32)."),
    "whole numbers": ({"x": SMALL["x"].int()}, "takes x and both weights in one of"),
    "no such backend": ({"dispatch": "fast"}, "dispatch='fast' is not one of reference, torch, triton"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dispatch", ["reference", "triton"])
def test_what_does_not_fit_is_refused_in_a_sentence_before_any_launch(case, dispatch):
    changes, sentence = REFUSED[case]
    changes = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in changes.items()}
    dispatch = changes.pop("dispatch", dispatch)
    with patch.object(ragged_mm, "_ragged_mm", None), pytest.raises(ValueError) as refused:
        call(experts, {**SMALL, **changes}, dispatch=dispatch)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("quantize", "w", "sentence"),
    [
        (quantize_mxfp4, torch.zeros(1, 2, 48), "mxfp4 takes rows of 32 weights or a multiple; they are 48 long."),
        (quantize_mxfp4, torch.full((1, 1, 32), torch.nan), "mxfp4 takes finite weights; some are not."),
        (quantize_int8, torch.full((1, 1, 8), torch.inf), "int8 takes finite weights"),
        (quantize_int8, torch.full((1, 1, 8), 1e200, dtype=torch.float64), "magnitudes that float32 holds"),
        (quantize_fp8, torch.full((1, 1, 8), torch.nan), "fp8 takes finite weights with magnitudes that float32 holds"),
        (quantize_fp8, torch.zeros(2, 8), "fp8 takes w (E, N, M); they are (2, 8)."),
        (quantize_int8, torch.zeros(1, 2, 0), "they are 0 long."),
        (quantize_int8, torch.zeros(2, 8), "int8 takes w (E, N, M); they are (2, 8)."),
        (quantize_mxfp4, torch.zeros(1, 2, 32, dtype=torch.int8), "mxfp4 takes w in bfloat16, float16"),
    ],
)
def test_what_cannot_be_quantised_is_refused_in_a_sentence(quantize, w, sentence):
    with pytest.raises(ValueError) as refused:
        quantize(w)
    assert sentence in str(refused.value)
