"""Layers whose products are in fp8: the definition by brute force, the kernels against it, and their gradients."""

import math
from unittest.mock import patch

import pytest
import torch

from kernels import fused, grouped, quantized, ragged_mm, reference, tuning
from kernels.form import NAMED, Form
from kernels.fp8 import rounded
from tests.kernels.small_experts import call, layer_arguments, relative_errors, run_kernels, run_rows, wrong_results
from tests.kernels.test_plan import DEVICE, LOADS
from tests.kernels.test_ragged_mm import Spy

FORMS = {
    "swiglu": Form("swiglu", fp8="all"),
    "gpt-oss": NAMED["swiglu_clipped"]._replace(fp8="all"),
    "relu2": Form("relu2", fp8="all"),
    "weights on the input": Form("swiglu", weigh_input=True, fp8="all"),
}


def _layer(form="swiglu", load="zipf", d=140, f=36, **rest):
    return layer_arguments(LOADS[load], form=FORMS[form], d=d, f=f, biased=form in ("gpt-oss", "relu2"), **rest)


def test_the_definition_is_products_of_rounded_operands_with_the_derivatives_of_the_others():
    """Row by row with plain numbers: the value from rounded operands, the derivatives from z and those unrounded."""
    arguments = _layer(d=140, f=12)
    x, w_up, w_down, weight = (arguments[name].detach() for name in ("x", "w_up", "w_down", "weight"))
    got = run_rows(arguments, reference.experts)
    dout = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = {name: torch.zeros_like(value) for name, value in got.items()}
    want["weight"] = want["weight"].view(weight.shape)
    for t, chosen in enumerate(arguments["expert"].tolist()):
        for k, e in enumerate(chosen):
            if e < 0:
                continue
            # Forward, in 8 bits.
            z = rounded(w_up[e], 128) @ rounded(x[t : t + 1], 1)[0]
            gate, up = z[:12], z[12:]
            share = 1 / (1 + (-gate).exp())
            h = gate * share * up
            want["out"][t] += weight[t, k] * (rounded(w_down[e], 128) @ rounded(h[None], 1)[0])
            # Backward, of x, w and h as they are.
            dy = weight[t, k] * dout[t]
            dh = w_down[e].T @ dy
            dz = torch.cat((dh * up * share * (1 + gate * (1 - share)), dh * gate * share))
            want["weight"][t, k] = dout[t] @ (w_down[e] @ h)
            want["w_down"][e] += dy[:, None] * h
            want["w_up"][e] += dz[:, None] * x[t]
            want["x"][t] += w_up[e].T @ dz
    want["weight"] = want["weight"].view(got["weight"].shape)
    assert max(relative_errors(got, want).values()) < 1e-12
    assert relative_errors(run_rows(dict(arguments, form="swiglu"), reference.experts), want)["out"] > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_the_definitions_forward_mode_derivatives_are_its_gradients(form):
    arguments = {key: value.detach() if torch.is_tensor(value) else value for key, value in _layer(form).items()}
    for name in ("x", "w_up", "w_down", "weight"):
        function = lambda value, name=name: run_flat(arguments | {name: value}, reference.experts)
        out, gradients = torch.func.vjp(function, arguments[name])
        along = torch.randn(arguments[name].shape, generator=torch.Generator().manual_seed(1)).to(arguments[name])
        derivative = torch.func.jvp(function, (arguments[name],), (along,))[1]
        torch.testing.assert_close((derivative * out).sum(), (gradients(out)[0] * along).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_fp8", [False, True], ids=["widened", "multiplied as they are"])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_every_gradient_are_the_references(form, in_fp8):
    """On GPUs that multiply E4M3, which only float64 is left out of, and on those that widen it."""
    dtype = torch.float32 if in_fp8 else torch.float64
    exact = 1e-6 if in_fp8 else 1e-12
    bound = 2e-2 if in_fp8 and DEVICE == "cuda" else exact  # tensor cores keep fewer bits of a sum: other codes of h
    sizes = [(140, 36, True), (36, 132, False)] if form in ("swiglu", "relu2") else [(140, 20, False)]
    for d, f, by_columns in sizes:
        arguments = _layer(form, d=d, f=f, by_columns=by_columns, dtype=dtype)
        want = run_rows(arguments, reference.experts, torch.float64)
        with patch.object(tuning, "multiplies_fp8", lambda *_: in_fp8):
            errors = relative_errors(run_kernels(arguments), want)
        assert max(errors.values()) < bound, errors
        errors = relative_errors(run_rows(arguments, grouped.experts), want)
        assert max(errors.values()) < exact, errors


@pytest.mark.parametrize(("form", "f"), [*((form, 256) for form in FORMS), ("swiglu", 140)])
def test_every_block_of_rows_and_matrices_has_a_scale_of_its_own(form, f):
    """Where a tile's gates and others lie in whole blocks, of which it reads one scale each, and where they do not."""
    arguments = _layer(form, d=140, f=f)
    factors = lambda n, base: base ** (torch.arange(n, dtype=torch.float64, device=DEVICE) // 128)
    with torch.no_grad():
        arguments["x"] *= factors(140, 16)
        for name in ("w_up", "w_down"):
            n, m = arguments[name].shape[1:]
            arguments[name] *= factors(n, 1 / 8)[:, None] * factors(m, 1 / 32)
        want = run_flat(arguments, reference.experts)
        got = call(fused.experts, arguments)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["swiglu", "relu2"])
def test_in_16_bits_the_kernels_are_as_wrong_as_any(form, dtype):
    assert wrong_results(_layer(form, dtype=dtype)) == []


def test_under_autocast_the_definition_rounds_what_autocast_would_multiply():
    """Not the float32 numbers: those round to others in one of 32."""
    arguments = _layer(d=256, f=256, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        want, got = run_rows(arguments, reference.experts), run_rows(arguments, grouped.experts)
    assert relative_errors(got, {"out": want["out"].double()})["out"] < 0.01


@pytest.mark.parametrize("load", LOADS)
def test_any_load_is_right(load):
    assert wrong_results(_layer(load=load, d=36, f=20)) == []


@pytest.mark.parametrize("tile", [{"block_k": 16}, {"block_k": 128, "block_n": 64}, {"block_n": 128, "parts": 4}])
def test_tiles_that_take_a_part_of_a_scales_block_or_several_are_right(tile):
    changed = lambda *given, looked_up=tuning.tile, **rest: looked_up(*given, **rest)._replace(**tile)
    with patch.object(tuning, "tile", changed):
        assert wrong_results(_layer(d=136, f=64)) == []


def test_what_is_multiplied_is_8_bits_and_its_scales():
    arguments, spy = _layer(dtype=torch.float32), Spy(ragged_mm._ragged_mm)
    for in_fp8, kind in ((True, torch.float8_e4m3fn), (False, torch.uint8)):
        spy.arguments.clear(), spy.launches.clear()
        with (
            patch.object(ragged_mm, "_ragged_mm", spy),
            patch.object(tuning, "multiplies_fp8", lambda *_, answer=in_fp8: answer),
        ):
            call(fused.experts, arguments)
        for given, constants in zip(spy.arguments, spy.launches, strict=True):
            assert [tensor.dtype for tensor in given[:2]] == [kind, kind]
            assert [tensor.dtype for tensor in given[-2:]] == [torch.float32] * 2
            assert (constants["QUANT"], constants["IN_FP8"]) == ("fp8", in_fp8)


@pytest.mark.parametrize("form", ["gpt-oss", "weights on the input"])
def test_weights_that_are_stored_in_fp8_make_the_same_layer(form):
    """Bitwise on the kernels; and the other backends round no weight again."""
    arguments = {key: value.detach() if torch.is_tensor(value) else value for key, value in _layer(form).items()}
    stored = dict(arguments, **{key: quantized.quantize_fp8(arguments[key]) for key in ("w_up", "w_down")})
    want = call(fused.experts, arguments)[0]
    assert torch.equal(call(quantized.experts, stored)[0], want)
    for dispatch in ("reference", "torch"):
        torch.testing.assert_close(call(quantized.experts, stored, dispatch=dispatch)[0], want, rtol=1e-12, atol=1e-12)


def test_any_scale_of_stored_weights_is_kept():
    """Not only powers of two, as what is rounded here has: nothing is rounded again."""
    arguments = {key: value.detach() if torch.is_tensor(value) else value for key, value in _layer().items()}
    for key in ("w_up", "w_down"):
        w = quantized.quantize_fp8(arguments[key])
        arguments[key] = w._replace(scales=w.scales * 0.7)
    outputs = [call(quantized.experts, arguments, dispatch=name)[0] for name in ("reference", "torch", "triton")]
    for got in outputs[1:]:
        torch.testing.assert_close(got, outputs[0], rtol=1e-12, atol=1e-12)


def test_a_token_that_is_not_finite_stays_alone():
    arguments = _layer(load="even")
    with torch.no_grad():
        arguments["x"][3, 7] = math.nan
    out_TD = call(fused.experts, arguments)[0]
    assert out_TD.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_a_compiled_graph_gives_the_same():
    for function in (lambda **rest: call(fused.experts, rest)[0], lambda **rest: run_flat(rest)):
        arguments = _layer(dtype=torch.float32)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**arguments), function(**arguments))


def run_flat(arguments, function=grouped.experts):
    """A backend's output, over flat rows."""
    expert = arguments["expert"]
    token = torch.arange(len(expert), device=DEVICE).repeat_interleave(expert.shape[1])
    rows = {"token": token, "expert": expert.flatten(), "weight": arguments["weight"].flatten()}
    return call(function, {**arguments, **rows})


def test_what_is_not_taken_is_refused_in_a_sentence_before_any_launch():
    arguments = _layer()
    with patch.object(ragged_mm, "_ragged_mm", None):
        with pytest.raises(ValueError, match=r"fp8='half' is not one of '', 'activations', 'all'"):
            call(fused.experts, dict(arguments, form=Form("swiglu", fp8="half")))
        with pytest.raises(ValueError, match=r"dispatch=triton rounds weights with the activations, fp8='all'"):
            call(fused.experts, dict(arguments, form=Form("swiglu", fp8="activations")))
