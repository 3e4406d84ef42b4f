"""The experts on Triton kernels against the reference: output, counts and every named gradient; memory; and what
torch.library, autograd, compile, autocast, checkpointing and DDP ask of a custom op.

In 16 bits and float32 a result may be at most twice as wrong as dispatch=torch's; four times in bfloat16 in Triton's
interpreter, which truncates where a GPU rounds: twice the error, all of it in one direction."""

import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from kernels import combine, grouped, ragged_mm, ragged_wgrad, reference, tuning
from kernels import fused as module
from kernels import plan as planning
from kernels.fused import experts
from kernels.operands import ACTIVATIONS
from tests.kernels.test_plan import DEVICE, LOADS, poisoned
from tests.kernels.test_ragged_mm import Spy

RESULTS = ("out", "x", "w_up", "w_down", "weight")  # of the last four, the gradients
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LIST = ([0, 0, 0, 2, 5, 5, 9], [1, -1, 1, 0, 2, 2, -1])  # tokens and experts of rows; most of ten tokens have none


def _arguments(expert, token=None, n_tokens=None, n_experts=5, d=20, f=12, activation="swiglu", dtype=torch.float64):
    """Everything `experts` takes, by name, at unit scale around these rows: nested lists or tensors."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)
    expert = torch.as_tensor(expert, dtype=torch.int64, device=DEVICE)
    n_tokens = n_tokens or len(expert)
    width = 2 * f if activation == "swiglu" else f
    tensors = {
        "x": draw(n_tokens, d),
        "w_up": draw(n_experts, width, d) / d**0.5,
        "w_down": draw(n_experts, d, f) / f**0.5,
        "weight": draw(*expert.shape).abs() + 0.5,
    }
    kinds = {"weight": dtype if dtype == torch.float64 else torch.float32}
    tensors = {name: each.to(DEVICE, kinds.get(name, dtype)).requires_grad_() for name, each in tensors.items()}
    token = None if token is None else torch.as_tensor(token, dtype=torch.int64, device=DEVICE)
    order = ("x", "w_up", "w_down", "token", "expert", "weight", "activation")
    return {name: {**tensors, "token": token, "expert": expert, "activation": activation}[name] for name in order}


def _gradients(out, arguments):
    """The output and every gradient, by name, for one gradient of the output."""
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    inputs = [arguments[name] for name in RESULTS[1:]]
    gradients = torch.autograd.grad(out, inputs, dout, allow_unused=True, materialize_grads=True)
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


def _run(arguments, **rest):
    """Output and gradients of the kernels, on poisoned memory."""
    with poisoned():
        return _gradients(experts(*arguments.values(), **rest)[0], arguments)


def _loop(arguments, function, dtype=None):
    """Output and gradients of another implementation, over flat rows, in this dtype."""
    cast = lambda each: each.detach().to(dtype or each.dtype).requires_grad_() if each.requires_grad else each
    arguments = {name: cast(each) if torch.is_tensor(each) else each for name, each in arguments.items()}
    expert = arguments["expert"]
    token = arguments["token"]
    if token is None:
        token = torch.arange(len(expert), device=DEVICE).repeat_interleave(expert.shape[1])
    rows = {"token": token, "expert": expert.flatten(), "weight": arguments["weight"].flatten()}
    return _gradients(function(*{**arguments, **rows}.values()), arguments)


def _errors(got, want):
    """Name -> relative Frobenius error; nothing against nothing is right."""
    error = lambda a, b: (a.double() - b).norm() / b.norm() if b.any() else a.double().norm()
    return {name: error(got[name], want[name]).item() for name in RESULTS}


def _wrong(arguments, **rest):
    """Names of the results that the kernels get wrong. The check that this file makes, so that it can be checked."""
    want, dtype = _loop(arguments, reference.experts, torch.float64), arguments["x"].dtype
    bounds = dict.fromkeys(RESULTS, 1e-12)
    if dtype != torch.float64:
        factor = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
        bounds = {name: factor * each for name, each in _errors(_loop(arguments, grouped.experts), want).items()}
    got = _run(arguments, **rest)
    assert all(got[name].dtype == arguments[name].dtype for name in RESULTS[1:])
    return [name for name, error in _errors(got, want).items() if not error <= bounds[name]]


@pytest.mark.parametrize("load", LOADS)
def test_output_and_gradients_are_the_references_for_any_load(load):
    assert _wrong(_arguments(LOADS[load])) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_right_for_any_activation_and_dtype(activation, dtype):
    assert _wrong(_arguments(LOADS["zipf"], activation=activation, dtype=dtype, d=36, f=28)) == []


@pytest.mark.parametrize("k", range(1, 10))
def test_output_and_gradients_are_the_references_for_any_k(k):
    assert _wrong(_arguments([[(t + 3 * j) % 12 - 1 for j in range(k)] for t in range(3)], n_experts=11)) == []


@pytest.mark.parametrize("n_tokens", [0, 1])
@pytest.mark.parametrize("n_experts", [1, 3, 70])
def test_no_token_and_one_token_are_enough(n_tokens, n_experts):
    expert = torch.arange(n_tokens * 3).view(n_tokens, 3) % n_experts
    assert _wrong(_arguments(expert, n_experts=n_experts, d=9, f=5)) == []


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_ragged_rows_are_the_references(activation):
    token, expert = LIST
    assert _wrong(_arguments(expert, token, n_tokens=10, activation=activation)) == []
    assert _wrong(_arguments([], [], n_tokens=10, activation=activation)) == []


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4)), max_size=16),
    st.sampled_from((1, 3)),
    st.sampled_from(ACTIVATIONS),
)
def test_output_and_gradients_are_the_references_for_any_rows(rows, times, activation):
    rows = sorted(rows * times)
    arguments = _arguments([e for _, e in rows], [t for t, _ in rows], n_tokens=6, activation=activation, d=7, f=3)
    assert _wrong(arguments) == []


@pytest.mark.parametrize("load", LOADS)
def test_counts_are_the_rows_of_every_expert(load):
    count_E = experts(*_arguments(LOADS[load]).values())[1]
    assert count_E.dtype == torch.int64
    assert count_E.tolist() == [sum(row.count(e) for row in LOADS[load]) for e in range(5)]


def test_rows_without_an_expert_and_experts_without_a_row_get_gradients_of_zero():
    arguments = _arguments(LOADS["some rows have no expert"])
    arguments["weight"] = arguments["weight"].detach().masked_fill(arguments["expert"] < 0, torch.nan).requires_grad_()
    got = _run(arguments)
    assert (got["weight"][arguments["expert"] < 0] == 0).all()
    got = _run(_arguments(LOADS["two experts are empty"]))
    for e in (1, 3):
        assert (got["w_up"][e] == 0).all()
        assert (got["w_down"][e] == 0).all()


def test_strided_operands_change_nothing():
    for plain, strided in (
        (_arguments(LOADS["zipf"]), _arguments(LOADS["zipf"])),
        (_arguments(LIST[1], LIST[0], n_tokens=10), _arguments(LIST[1], LIST[0], n_tokens=10)),
    ):
        for name, each in strided.items():
            if torch.is_tensor(each):  # every second element of a larger one
                strided[name] = each.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(each.requires_grad)
                assert not strided[name].is_contiguous()
        results = [_run(each) for each in (plain, strided)]
        assert all(torch.equal(results[0][name], results[1][name]) for name in RESULTS)


def test_a_strided_gradient_of_the_output_changes_nothing():
    arguments = _arguments(LOADS["zipf"])
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    out = experts(*arguments.values())[0]
    expanded, dense = (
        torch.autograd.grad(out, arguments["x"], each, retain_graph=True)[0]
        for each in (one.expand(out.shape), torch.ones_like(out))
    )
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bitwise_equal(dtype):
    arguments = _arguments(LOADS["zipf"], dtype=dtype)
    first, second = _run(arguments), _run(arguments)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


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
    arguments, (names, launches) = _arguments(LOADS["zipf"], activation=activation), FROZEN[frozen]
    whole, seen = _run(arguments), []
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


def test_what_is_not_asked_of_the_backward_is_not_stored_by_it():
    spy = Spy(ragged_mm._ragged_mm)
    with patch.object(ragged_mm, "_ragged_mm", spy):
        out = experts(*_frozen(_arguments(LOADS["zipf"]), ("w_up", "w_down", "weight")).values())[0]
        out.sum().backward()
    (args,) = [args for args, each in zip(spy.arguments, spy.launches, strict=True) if each["EPILOGUE"] == "backward"]
    assert [args[i] is None for i in (2, 3, 6)] == [False, True, True]  # dz; w h; d(weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_a_gradient_z_is_not_written_and_the_output_is_bitwise_the_same(activation, dtype):
    arguments = _arguments(LOADS["zipf"], activation=activation, dtype=dtype)
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
    arguments = _arguments(LOADS["zipf"], dtype=torch.float32)
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
    arguments = _arguments(LOADS[load], activation=activation, dtype=torch.bfloat16, d=64, f=48)
    t, k, d, f, e = 24, 3, 64, 48, 5
    tiles = -(-t * k // tuning.block_m(torch.device(DEVICE), torch.bfloat16, False, t * k, e)) + e
    per_token = 2 * d + (4 if activation == "swiglu" else 2) * k * f + 16 * k
    assert _saved(arguments) == t * per_token + 8 * tiles + 4 * e + 8


def test_ragged_rows_keep_8_bytes_more_a_token():
    expert = torch.tensor(LOADS["zipf"])
    fixed = _arguments(expert, dtype=torch.bfloat16)
    token = torch.arange(24).repeat_interleave(3)
    ragged = _arguments(expert.flatten(), token, n_tokens=24, dtype=torch.bfloat16)
    assert _saved(ragged) == _saved(fixed) + 8 * (24 + 1)


def _ops(arguments):
    """The arguments of the three ops."""
    x, w_up, w_down, token, expert, weight, activation = arguments.values()
    plan = (expert, token, len(w_up), x.dtype, False)
    routing = list(module._plan(*plan))
    start = None if token is None else torch.searchsorted(token, torch.arange(len(x) + 1, device=DEVICE))
    rest = (weight, routing, start, activation, False)
    out, z = module._forward(x, w_up, w_down, *rest)
    detached = [each.detach() for each in (torch.randn_like(out), x, z, w_up, w_down, weight)]
    return {"plan": plan, "forward": (x, w_up, w_down, *rest), "backward": (*detached, *rest[1:])}


@pytest.mark.parametrize("op", ["plan", "forward", "backward"])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_passes(op, ragged):
    # Every row has an expert: z's rows without one are never written, and opcheck compares all of z between runs.
    arguments = _arguments([[0, 4, 2], [1, 1, 0]])
    if ragged:
        arguments = _arguments([max(0, e) for e in LIST[1]], LIST[0], n_tokens=10)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    if op == "plan":  # what the schedule does not use is never written, so no two runs agree there
        tests = tests[:2]
    more = {"plan": (), "forward": (False,), "backward": (True, False, False, True)}[op]
    without = [each.detach() if torch.is_tensor(each) else each for each in _ops(arguments)[op]]
    for operands in (_ops(arguments)[op], (*without, *more)):
        result = torch.library.opcheck(getattr(module, f"_{op}"), operands, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


def test_compiled_in_one_graph_it_gives_the_same_for_every_routing():
    function = lambda x, *rest: experts(x.tanh(), *rest)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for load in LOADS:
            arguments = _arguments(LOADS[load], dtype=torch.float32)
            (out, count), (mine, counted) = (each(*arguments.values()) for each in (function, compiled))
            assert torch.equal(count, counted)
            eager, got = _gradients(out, arguments), _gradients(mine, arguments)
            assert all(torch.equal(eager[name], got[name]) for name in RESULTS), load


def test_compiled_once_it_takes_lists_of_any_length():
    compiled = torch.compile(lambda *each: experts(*each)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_rows in (7, 19, 30):
            token = torch.arange(n_rows) // 3
            arguments = _arguments(token % 5, token, n_tokens=11)
            assert torch.equal(compiled(*arguments.values()), experts(*arguments.values())[0])


def test_under_activation_checkpointing_the_gradients_are_bitwise_the_same():
    arguments = _arguments(LOADS["zipf"], dtype=torch.float32)
    plain = _gradients(experts(*arguments.values())[0], arguments)
    again = _gradients(checkpoint(experts, *arguments.values(), use_reentrant=False)[0], arguments)
    assert all(torch.equal(plain[name], again[name]) for name in RESULTS)


def test_autocast_rounds_x_and_the_weights_and_returns_float32_gradients():
    arguments = _arguments(LOADS["zipf"], dtype=torch.float32)
    rounded = {
        name: each.detach().bfloat16() if name in ("x", "w_up", "w_down") else each for name, each in arguments.items()
    }
    with torch.autocast(DEVICE, torch.bfloat16):
        out = experts(*arguments.values())[0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, experts(*rounded.values())[0])
    assert {each.dtype for name, each in _gradients(out, arguments).items() if name != "out"} == {torch.float32}


class _Layer(torch.nn.Module):
    """Experts as parameters."""

    def __init__(self, arguments):
        super().__init__()
        self.w_up, self.w_down = (torch.nn.Parameter(arguments[name].detach().clone()) for name in ("w_up", "w_down"))

    def forward(self, x, expert, weight):
        return experts(x, self.w_up, self.w_down, None, expert, weight, "swiglu")[0]


def test_under_ddp_the_gradients_are_the_same(tmp_path):
    arguments = _arguments(LOADS["two experts are empty"], dtype=torch.float32)
    plain, wrapped = _Layer(arguments), _Layer(arguments)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
        for each in (plain, parallel):
            each(*(arguments[name] for name in ("x", "expert", "weight"))).square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(plain.w_up.grad, wrapped.w_up.grad)
    assert torch.equal(plain.w_down.grad, wrapped.w_down.grad)
    assert plain.w_up.grad.any()


def test_a_second_derivative_is_refused():
    arguments = _arguments(LOADS["zipf"])
    loss = experts(*arguments.values())[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, arguments["x"], create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"^dispatch=triton has no second derivative; dispatch=reference does"
    ):
        gradient.sum().backward()


REFUSALS = {
    "dtype": (
        {"x": torch.zeros(2, 4, dtype=torch.int32)},
        "dispatch=triton takes x and both weights in one of bfloat16, float16, float32, float64; they are "
        "torch.int32, torch.float32, torch.float32.",
    ),
    "mixed dtypes": (
        {"w_down": torch.zeros(5, 4, 3, dtype=torch.float16)},
        "one of bfloat16, float16, float32, float64; they are torch.float32, torch.float32, torch.float16.",
    ),
    "devices": (
        {"w_up": torch.zeros(5, 6, 4, device="meta")},
        "dispatch=triton takes operands on one device; they are on [",
    ),
    "tokens on another device": (
        {"token": torch.zeros(6, dtype=torch.int64, device="meta")},
        "dispatch=triton takes operands on one device; they are on [",
    ),
    "weights of two dimensions": ({"w_up": torch.zeros(6, 4)}, "they are (2, 4), (6, 4), (5, 4, 3)."),
    "width of x": (
        {"x": torch.zeros(2, 5)},
        "dispatch=triton takes x (T, D), w_up (E, 2F, D), w_down (E, D, F); they are (2, 5), (5, 6, 4), (5, 4, 3).",
    ),
    "x of three dimensions": ({"x": torch.zeros(1, 2, 4)}, "they are (1, 2, 4), (5, 6, 4), (5, 4, 3)."),
    "an ungated width": ({"w_up": torch.zeros(5, 3, 4)}, "they are (2, 4), (5, 3, 4), (5, 4, 3)."),
    "a gated width": (
        {"activation": "gelu"},
        "w_up (E, 1F, D), w_down (E, D, F); they are (2, 4), (5, 6, 4), (5, 4, 3).",
    ),
    "another number of experts": ({"w_down": torch.zeros(4, 4, 3)}, "they are (2, 4), (5, 6, 4), (4, 4, 3)."),
    "weights": (
        {"weight": torch.zeros(2, 2)},
        "dispatch=triton takes expert and weight (T, K), or (N,) with token_N (N,); they are (2, 3), (2, 2), None.",
    ),
    "another number of tokens": ({"x": torch.zeros(3, 4)}, "they are (2, 3), (2, 3), None."),
    "rows without tokens": (
        {"expert": torch.zeros(6, dtype=torch.int64), "weight": torch.zeros(6)},
        "they are (6,), (6,), None.",
    ),
    "tokens of other rows": ({"token": torch.zeros(6, dtype=torch.int64)}, "they are (2, 3), (2, 3), (6,)."),
    "activation": ({"activation": "relu"}, "activation='relu' is not one of swiglu, gelu, gelu_tanh, relu2."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_operands_that_the_kernels_do_not_take_are_refused_in_a_sentence(case):
    changes, sentence = REFUSALS[case]
    arguments = _arguments([[0, 1, 2], [3, 4, -1]], d=4, f=3, dtype=torch.float32)
    changes = {k: v.to(DEVICE) if torch.is_tensor(v) and v.device.type == "cpu" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        experts(*{**arguments, **changes}.values())


def test_two_to_the_31_rows_are_refused():
    new = lambda *shape: torch.empty(shape, device="meta")
    ids = torch.empty(1, 2**31, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"takes fewer than 2\^31 routed rows; there are 2147483648\.$"):
        module._check(new(1, 4), new(5, 6, 4), new(5, 4, 3), None, ids, new(1, 2**31), "swiglu")


def test_one_experts_weight_of_two_to_the_31_elements_is_refused():
    new = lambda *shape: torch.empty(shape, device="meta")
    d, ids = 2**15, torch.empty(1, 2, dtype=torch.int64, device="meta")

    def check(f, activation, gate):
        module._check(new(1, d), new(2, gate * f, d), new(2, d, f), None, ids, new(1, 2), activation)

    for activation, gate in (("swiglu", 2), ("relu2", 1)):
        check(2**16 // gate - 1, activation, gate)
        sentence = rf"takes experts whose w_up has fewer than 2\^31 elements; {gate}F·D is 2147483648\.$"
        with pytest.raises(ValueError, match=sentence):
            check(2**16 // gate, activation, gate)


class Zeroed:
    """A kernel that, on launches that have these constants, leaves zeros in its outputs, which are these arguments."""

    def __init__(self, kernel, outputs, constants):
        self.kernel, self.outputs, self.constants = kernel, outputs, constants

    def __getitem__(self, grid):
        def launch(*args, **constants):
            if not self.constants.items() <= constants.items():
                return self.kernel[grid](*args, **constants)
            for i in self.outputs:
                if args[i] is not None:
                    args[i].zero_()

        return launch


STORE = {"EPILOGUE": "store"}
# What each kernel's zeros spoil: module, kernel, outputs, the launches, the results.
ZEROED = {
    "count": (planning, "_count", (1,), {}, RESULTS),
    "scan": (planning, "_scan", (1, 2, 3), {}, RESULTS),
    "place": (planning, "_place", (4, 5, 6, 7, 8), {}, RESULTS),
    "up": (ragged_mm, "_ragged_mm", (2, 3), {"EPILOGUE": "activate"}, RESULTS),
    "down": (ragged_mm, "_ragged_mm", (2,), STORE | {"K_MAJOR": True}, ("out",)),
    "combine": (combine, "_combine", (5,), {"WEIGHTED": True}, ("out",)),
    "dh": (ragged_mm, "_ragged_mm", (2, 3, 6), {"EPILOGUE": "backward"}, RESULTS[1:]),
    "wgrad of down": (ragged_wgrad, "_ragged_wgrad", (2,), {"GATHER_P": True}, ("w_down",)),
    "wgrad of up": (ragged_wgrad, "_ragged_wgrad", (2,), {"GATHER_P": False}, ("w_up",)),
    "dx": (ragged_mm, "_ragged_mm", (2,), STORE | {"K_MAJOR": False}, ("x",)),
    "plain combine": (combine, "_combine", (5,), {"WEIGHTED": False}, ("x",)),
}


@pytest.mark.parametrize("name", ZEROED)
def test_the_check_in_16_bits_rejects_a_kernel_that_writes_zeros(name):
    where, kernel, outputs, constants, spoilt = ZEROED[name]
    arguments = _arguments(LOADS["zipf"], dtype=torch.bfloat16)
    with patch.object(where, kernel, Zeroed(getattr(where, kernel), outputs, constants)):
        assert _wrong(arguments) == list(spoilt)


@pytest.mark.parametrize("name", RESULTS[1:])
def test_the_check_rejects_one_gradient_that_is_a_tenth_too_small(name):
    def shrunk(*args):
        gradients = real(*args)
        return tuple(each * 0.9 if i == at else each for i, each in enumerate(gradients))

    real, at = module._backward, RESULTS.index(name) - 1
    for dtype in (torch.float64, torch.bfloat16):
        with patch.object(module, "_backward", shrunk):
            assert _wrong(_arguments(LOADS["zipf"], dtype=dtype)) == [name]


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_reaches_every_product_and_is_off_by_default(tf32):
    mm, wgrad = Spy(ragged_mm._ragged_mm), Spy(ragged_wgrad._ragged_wgrad)
    with patch.object(ragged_mm, "_ragged_mm", mm), patch.object(ragged_wgrad, "_ragged_wgrad", wgrad):
        _run(_arguments(LOADS["zipf"], dtype=torch.float32), **({"tf32": True} if tf32 else {}))
    assert [each["PRECISION"] for each in mm.launches + wgrad.launches] == ["tf32" if tf32 else "ieee"] * 6
