"""The experts on Triton kernels against the reference: output, counts and every named gradient; and what
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

from kernels import combine, ragged_mm, ragged_wgrad
from kernels import fused as module
from kernels import plan as planning
from kernels.form import ACTIVATIONS, Form, form_of
from kernels.fused import experts
from tests.kernels.small_experts import RESULTS, layer_arguments, named_gradients, run_kernels, wrong_results
from tests.kernels.test_plan import DEVICE, LOADS
from tests.kernels.test_ragged_mm import Spy

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LIST = ([0, 0, 0, 2, 5, 5, 9], [1, -1, 1, 0, 2, 2, -1])  # tokens and experts of rows; most of ten tokens have none


@pytest.mark.parametrize("load", LOADS)
def test_output_and_gradients_are_the_references_for_any_load(load):
    assert wrong_results(layer_arguments(LOADS[load])) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_right_for_any_activation_and_dtype(activation, dtype):
    assert wrong_results(layer_arguments(LOADS["zipf"], form=activation, dtype=dtype, d=36, f=28)) == []


@pytest.mark.parametrize("k", range(1, 10))
def test_output_and_gradients_are_the_references_for_any_k(k):
    assert (
        wrong_results(layer_arguments([[(t + 3 * j) % 12 - 1 for j in range(k)] for t in range(3)], n_experts=11)) == []
    )


@pytest.mark.parametrize("n_tokens", [0, 1])
@pytest.mark.parametrize("n_experts", [1, 3, 70])
def test_no_token_and_one_token_are_enough(n_tokens, n_experts):
    expert = torch.arange(n_tokens * 3).view(n_tokens, 3) % n_experts
    assert wrong_results(layer_arguments(expert, n_experts=n_experts, d=9, f=5)) == []


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_ragged_rows_are_the_references(activation):
    token, expert = LIST
    assert wrong_results(layer_arguments(expert, token, n_tokens=10, form=activation)) == []
    assert wrong_results(layer_arguments([], [], n_tokens=10, form=activation)) == []


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4)), max_size=16),
    st.sampled_from((1, 3)),
    st.sampled_from(ACTIVATIONS),
)
def test_output_and_gradients_are_the_references_for_any_rows(rows, times, activation):
    rows = sorted(rows * times)
    arguments = layer_arguments([e for _, e in rows], [t for t, _ in rows], n_tokens=6, form=activation, d=7, f=3)
    assert wrong_results(arguments) == []


@pytest.mark.parametrize("load", LOADS)
def test_counts_are_the_rows_of_every_expert(load):
    count_E = experts(*layer_arguments(LOADS[load]).values())[1]
    assert count_E.dtype == torch.int64
    assert count_E.tolist() == [sum(row.count(e) for row in LOADS[load]) for e in range(5)]


def test_rows_without_an_expert_and_experts_without_a_row_get_gradients_of_zero():
    arguments = layer_arguments(LOADS["some rows have no expert"])
    arguments["weight"] = arguments["weight"].detach().masked_fill(arguments["expert"] < 0, torch.nan).requires_grad_()
    got = run_kernels(arguments)
    assert (got["weight"][arguments["expert"] < 0] == 0).all()
    got = run_kernels(layer_arguments(LOADS["two experts are empty"]))
    for e in (1, 3):
        assert (got["w_up"][e] == 0).all()
        assert (got["w_down"][e] == 0).all()


def test_strided_operands_change_nothing():
    for plain, strided in (
        (layer_arguments(LOADS["zipf"]), layer_arguments(LOADS["zipf"])),
        (layer_arguments(LIST[1], LIST[0], n_tokens=10), layer_arguments(LIST[1], LIST[0], n_tokens=10)),
    ):
        for name, each in strided.items():
            if torch.is_tensor(each) and name not in ("w_up", "w_down"):  # every second element of a larger one
                strided[name] = each.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(each.requires_grad)
                assert not strided[name].is_contiguous()
        results = [run_kernels(each) for each in (plain, strided)]
        assert all(torch.equal(results[0][name], results[1][name]) for name in RESULTS)


def test_a_strided_gradient_of_the_output_changes_nothing():
    arguments = layer_arguments(LOADS["zipf"])
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    out = experts(*arguments.values())[0]
    expanded, dense = (
        torch.autograd.grad(out, arguments["x"], each, retain_graph=True)[0]
        for each in (one.expand(out.shape), torch.ones_like(out))
    )
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_are_bitwise_equal(dtype):
    arguments = layer_arguments(LOADS["zipf"], dtype=dtype)
    first, second = run_kernels(arguments), run_kernels(arguments)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


def _ops(arguments):
    """The arguments of the three ops."""
    x, w_up, w_down, token, expert, weight, form, *biases = arguments.values()
    plan = (expert, token, len(w_up), x.dtype, False)
    routing = module._plan(*plan)
    start = None if token is None else torch.searchsorted(token, torch.arange(len(x) + 1, device=DEVICE))
    weights, rest = (w_up, w_down, weight, *(biases or (None, None))), (*form_of(form), False)
    out, z = module._forward(x, *weights, start, *routing, *rest, True)
    detach = lambda tensors: [None if each is None else each.detach() for each in tensors]
    backward = (*detach((torch.randn_like(out), x, z, *weights)), start, *routing, *rest)
    return {
        "plan": plan,
        "forward": (x, *weights, start, *routing, *rest, True),
        "backward": (*backward, [True] * 4 + [bool(biases)] * 2),
    }


def _biases(arguments):
    shapes = {"b_up_EF": arguments["w_up"].shape[:2], "b_down_ED": arguments["w_down"].shape[:2]}
    return {name: torch.ones(shape, dtype=torch.float64, device=DEVICE) for name, shape in shapes.items()}


@pytest.mark.parametrize("op", ["plan", "forward", "backward"])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_passes(op, ragged):
    # Every row has an expert: z's rows without one are never written, and opcheck compares all of z between runs.
    arguments = layer_arguments([[0, 4, 2], [1, 1, 0]])
    if ragged:
        arguments = layer_arguments([max(0, e) for e in LIST[1]], LIST[0], n_tokens=10)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    if op == "plan":  # what the schedule does not use is never written, so no two runs agree there
        tests = tests[:2]
    # Also with biases, and with no gradient but some.
    for biased in (False, True):
        operands = list(_ops({**arguments, **_biases(arguments)} if biased else arguments)[op])
        if biased and op != "plan":
            operands = [each.detach() if torch.is_tensor(each) else each for each in operands]
            operands[-1] = False if op == "forward" else [True, False, False, True, True, True]
        result = torch.library.opcheck(getattr(module, f"_{op}"), operands, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


def test_compiled_in_one_graph_it_gives_the_same_for_every_routing():
    function = lambda x, *rest: experts(x.tanh(), *rest)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for load in LOADS:
            arguments = layer_arguments(LOADS[load], dtype=torch.float32)
            (out, count), (mine, counted) = (each(*arguments.values()) for each in (function, compiled))
            assert torch.equal(count, counted)
            eager, got = named_gradients(out, arguments), named_gradients(mine, arguments)
            assert all(torch.equal(eager[name], got[name]) for name in RESULTS), load


def test_compiled_once_it_takes_lists_of_any_length():
    compiled = torch.compile(lambda *each: experts(*each)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_rows in (7, 19, 30):
            token = torch.arange(n_rows) // 3
            arguments = layer_arguments(token % 5, token, n_tokens=11)
            assert torch.equal(compiled(*arguments.values()), experts(*arguments.values())[0])


def test_under_activation_checkpointing_the_gradients_are_bitwise_the_same():
    arguments = layer_arguments(LOADS["zipf"], dtype=torch.float32)
    plain = named_gradients(experts(*arguments.values())[0], arguments)
    again = named_gradients(checkpoint(experts, *arguments.values(), use_reentrant=False)[0], arguments)
    assert all(torch.equal(plain[name], again[name]) for name in RESULTS)


def test_autocast_rounds_x_and_the_weights_and_returns_float32_gradients():
    arguments = layer_arguments(LOADS["zipf"], dtype=torch.float32)
    rounded = {
        name: each.detach().bfloat16() if name in ("x", "w_up", "w_down") else each for name, each in arguments.items()
    }
    with torch.autocast(DEVICE, torch.bfloat16):
        out = experts(*arguments.values())[0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, experts(*rounded.values())[0])
    assert {each.dtype for name, each in named_gradients(out, arguments).items() if name != "out"} == {torch.float32}


class _Layer(torch.nn.Module):
    """Experts as parameters."""

    def __init__(self, arguments):
        super().__init__()
        self.w_up, self.w_down = (torch.nn.Parameter(arguments[name].detach().clone()) for name in ("w_up", "w_down"))

    def forward(self, x, expert, weight):
        return experts(x, self.w_up, self.w_down, None, expert, weight, "swiglu")[0]


def test_under_ddp_the_gradients_are_the_same(tmp_path):
    arguments = layer_arguments(LOADS["two experts are empty"], dtype=torch.float32)
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
    arguments = layer_arguments(LOADS["zipf"])
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
        {"form": "gelu"},
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
    "activation": (
        {"form": "relu"},
        "activation='relu' is not one of swiglu, gelu, gelu_tanh, relu2, swiglu_clipped.",
    ),
    "a matrix with gaps": (
        {"w_up": torch.zeros(5, 6, 8)[..., ::2]},
        "takes w_up with each expert's matrix stored by rows or by columns, without gaps; its strides are (48, 8, 2)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_operands_that_the_kernels_do_not_take_are_refused_in_a_sentence(case):
    changes, sentence = REFUSALS[case]
    arguments = layer_arguments([[0, 1, 2], [3, 4, -1]], d=4, f=3, dtype=torch.float32)
    changes = {k: v.to(DEVICE) if torch.is_tensor(v) and v.device.type == "cpu" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        experts(*{**arguments, **changes}.values())


def test_two_to_the_31_rows_are_refused():
    new = lambda *shape: torch.empty(shape, device="meta")
    ids = torch.empty(1, 2**31, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"takes fewer than 2\^31 routed rows; there are 2147483648\.$"):
        module._check(new(1, 4), new(5, 6, 4), new(5, 4, 3), None, ids, new(1, 2**31), Form("swiglu"), None, None)


def test_one_experts_weight_of_two_to_the_31_elements_is_refused():
    new = lambda *shape: torch.empty(shape, device="meta")
    d, ids = 2**15, torch.empty(1, 2, dtype=torch.int64, device="meta")

    def check(f, activation, gate):
        module._check(new(1, d), new(2, gate * f, d), new(2, d, f), None, ids, new(1, 2), Form(activation), None, None)

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
    "scan": (planning, "_scan", (1, 2), {}, RESULTS),
    "place": (planning, "_place", (4, 5, 6, 7, 8, 9, 10), {}, RESULTS),
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
    arguments = layer_arguments(LOADS["zipf"], dtype=torch.bfloat16)
    with patch.object(where, kernel, Zeroed(getattr(where, kernel), outputs, constants)):
        assert wrong_results(arguments) == list(spoilt)


@pytest.mark.parametrize("name", RESULTS[1:])
def test_the_check_rejects_one_gradient_that_is_a_tenth_too_small(name):
    def shrunk(*args):
        gradients = real(*args)
        return tuple(each * 0.9 if i == at else each for i, each in enumerate(gradients))

    real, at = module._backward, RESULTS.index(name) - 1
    for dtype in (torch.float64, torch.bfloat16):
        with patch.object(module, "_backward", shrunk):
            assert wrong_results(layer_arguments(LOADS["zipf"], dtype=dtype)) == [name]


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_reaches_every_product_and_is_off_by_default(tf32):
    mm, wgrad = Spy(ragged_mm._ragged_mm), Spy(ragged_wgrad._ragged_wgrad)
    with patch.object(ragged_mm, "_ragged_mm", mm), patch.object(ragged_wgrad, "_ragged_wgrad", wgrad):
        run_kernels(layer_arguments(LOADS["zipf"], dtype=torch.float32), **({"tf32": True} if tf32 else {}))
    assert [each["PRECISION"] for each in mm.launches + wgrad.launches] == ["tf32" if tf32 else "ieee"] * 6
