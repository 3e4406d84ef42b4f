"""What the experts on Triton kernels do not compute, write or keep, because nothing wants it."""

from unittest.mock import patch

import pytest
import torch

from kernels import fused as module
from kernels import ragged_mm, ragged_wgrad, tuning
from kernels.form import ACTIVATIONS
from kernels.fused import experts
from tests.kernels.small_experts import RESULTS, call, layer_arguments, named_gradients, run_kernels
from tests.kernels.test_plan import DEVICE, LOADS, poisoned
from tests.kernels.test_ragged_mm import Spy

FROZEN = {  # what is frozen: the launches of the backward's matmuls that are left
    "nothing": ((), ["dh", "wgrad of down", "wgrad of up", "dx"]),
    "experts": (("w_up", "w_down"), ["dh", "dx"]),
    "up": (("w_up",), ["dh", "wgrad of down", "dx"]),
    "down": (("w_down",), ["dh", "wgrad of up", "dx"]),
    "x": (("x",), ["dh", "wgrad of down", "wgrad of up"]),
    "weights": (("weight",), ["dh", "wgrad of down", "wgrad of up", "dx"]),
    "all but the weights": (("x", "w_up", "w_down"), ["dh"]),
    "all but x": (("w_up", "w_down", "weight"), ["dh", "dx"]),
    "all but up": (("x", "w_down", "weight"), ["dh", "wgrad of up"]),
    "all but down": (("x", "w_up", "weight"), ["dh", "wgrad of down"]),
}


def _frozen(arguments, names):
    """The same arguments, of which these want no gradient."""
    return {name: each.detach() if name in names else each for name, each in arguments.items()}


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_costs_no_kernel_and_leaves_the_other_gradients_bitwise(frozen, activation):
    arguments, (names, launches) = layer_arguments(LOADS["zipf"], form=activation), FROZEN[frozen]
    whole, seen = run_kernels(arguments), []
    real = {name: getattr(module, name) for name in ("dh", "ragged_wgrad", "dx")}

    def spied(name):
        def function(*args, **rest):
            wgrad = {True: "wgrad of down", False: "wgrad of up"}.get(args[3]) if name == "ragged_wgrad" else None
            seen.append(wgrad or name)
            return real[name](*args, **rest)

        return function

    left = [name for name in RESULTS[1:] if name not in names]
    with patch.multiple(module, **{name: spied(name) for name in real}), poisoned():
        out = experts(*_frozen(arguments, names).values())[0]
        dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        got = torch.autograd.grad(out, [arguments[name] for name in left], dout)
    assert seen == launches
    assert all(torch.equal(each, whole[name]) for name, each in zip(left, got, strict=True))


BIASES = {  # whose gradient is wanted: the launches of the backward's kernels
    "b_up_EF": ["dh", "ragged_sum"],
    "b_down_ED": ["ragged_sum"],
    "w_down": ["dh", "ragged_wgrad"],
    "x": ["dh", "dx"],
}


@pytest.mark.parametrize("wanted", BIASES)
def test_a_bias_that_is_frozen_costs_no_kernel_and_one_that_is_not_its_own_alone(wanted):
    arguments = layer_arguments(LOADS["zipf"], form="swiglu_clipped", biased=True)
    whole, seen = run_kernels(arguments), []
    real = {name: getattr(module, name) for name in ("dh", "ragged_wgrad", "ragged_sum", "dx")}
    spied = {name: lambda *args, name=name: seen.append(name) or real[name](*args) for name in real}
    left = {name: t.detach() if torch.is_tensor(t) and name != wanted else t for name, t in arguments.items()}
    with patch.multiple(module, **spied), poisoned():
        got = named_gradients(call(experts, left)[0], {wanted: left[wanted]})
    assert seen == BIASES[wanted]
    assert torch.equal(got[wanted], whole[wanted])


def test_what_is_not_asked_of_the_backward_is_not_stored_by_it():
    spy = Spy(ragged_mm._ragged_mm)
    with patch.object(ragged_mm, "_ragged_mm", spy):
        out = experts(*_frozen(layer_arguments(LOADS["zipf"]), ("w_up", "w_down", "weight")).values())[0]
        out.sum().backward()
    (args,) = [args for args, each in zip(spy.arguments, spy.launches, strict=True) if each["EPILOGUE"] == "backward"]
    assert [args[i] is None for i in (2, 3, 6)] == [False, True, True]  # dz; w h; d(weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_a_gradient_z_is_not_written_and_the_output_is_bitwise_the_same(activation, dtype):
    arguments = layer_arguments(LOADS["zipf"], form=activation, dtype=dtype)
    frozen = _frozen(arguments, RESULTS[1:])
    with poisoned():
        whole = experts(*arguments.values())[0]
        for wants, mode in ((arguments, torch.no_grad), (arguments, torch.inference_mode), (frozen, torch.enable_grad)):
            spy = Spy(ragged_mm._ragged_mm)
            with mode(), patch.object(ragged_mm, "_ragged_mm", spy):
                assert torch.equal(experts(*wants.values())[0], whole)
            assert [args[2] is None for args in spy.arguments] == [True, False]  # up's z, down's y


@pytest.mark.parametrize("frozen", ["experts", "all but the weights"])
def test_compiled_in_one_graph_what_is_frozen_costs_no_kernel_either(frozen):
    names, launches = FROZEN[frozen]
    arguments = layer_arguments(LOADS["zipf"], dtype=torch.float32)
    left = [arguments[name] for name in RESULTS[1:] if name not in names]
    function = lambda *rest: experts(*rest)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mm, wgrad, gradients = Spy(ragged_mm._ragged_mm), Spy(ragged_wgrad._ragged_wgrad), []
    for each in (function, compiled):
        with patch.object(ragged_mm, "_ragged_mm", mm), patch.object(ragged_wgrad, "_ragged_wgrad", wgrad):
            gradients.append(torch.autograd.grad(each(*_frozen(arguments, names).values()).square().sum(), left))
    assert len(mm.launches) == 2 * (2 + len(launches))
    assert not wgrad.launches
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad(), patch.object(ragged_mm, "_ragged_mm", mm):
        compiled(*arguments.values())
    assert mm.arguments[-2][2] is None


def _saved(arguments):
    """Bytes kept for the backward, parameters apart."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.update({each.data_ptr(): each.untyped_storage().nbytes()}) or each, lambda each: each
    ):
        experts(*arguments.values())
    parameters = {arguments[name].data_ptr() for name in ("w_up", "w_down")}
    assert parameters <= kept.keys()  # themselves, not a copy
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_saved_are_x_and_z_and_16_bytes_a_row_whatever_the_load(load, activation):
    """2 D + 4 K F + 16 K bytes per token in 16 bits for swiglu, 2 D + 2 K F + 16 K for the rest: x, z, and of every row
    its weight, slot, row and token. Beside that only the schedule, 8 bytes a tile, and 4 an expert, 8 in all."""
    arguments = layer_arguments(LOADS[load], form=activation, dtype=torch.bfloat16, d=64, f=48)
    t, k, d, f, e = 24, 3, 64, 48, 5
    tiles = -(-t * k // tuning.block_m(torch.device(DEVICE), torch.bfloat16, False, t * k, e)) + e
    per_token = 2 * d + (4 if activation == "swiglu" else 2) * k * f + 16 * k
    assert _saved(arguments) == t * per_token + 8 * tiles + 4 * e + 8


def test_ragged_rows_keep_8_bytes_more_a_token():
    expert = torch.tensor(LOADS["zipf"])
    fixed = layer_arguments(expert, dtype=torch.bfloat16)
    token = torch.arange(24).repeat_interleave(3)
    ragged = layer_arguments(expert.flatten(), token, n_tokens=24, dtype=torch.bfloat16)
    assert _saved(ragged) == _saved(fixed) + 8 * (24 + 1)
