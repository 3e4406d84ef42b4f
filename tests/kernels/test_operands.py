"""Operands of a wrong type, shape, device or layout are refused by every backend and every kernel in a sentence; rows
that make no sense in a debug build; forward-mode derivatives by all but the reference."""

import re

import pytest
import torch
from torch.autograd import forward_ad

from kernels import fused, grouped, operands, reference, tuning
from kernels.combine import combine
from kernels.gate import gate
from kernels.plan import plan
from kernels.ragged_mm import dh, down, dx, up
from kernels.ragged_wgrad import ragged_wgrad
from tests.kernels.test_plan import DEVICE

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
EXPERTS = {"reference": reference.experts, "torch": grouped.experts, "triton": lambda *rows: fused.experts(*rows)[0]}
GATES = {"reference": reference.gate, "triton": gate}
TILE = tuning.Tile(16, 16, 16, 1, 1, 4, 2, False, 0)


def _draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def _ids(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def _rows(**changes):
    """Operands of a layer of four tokens, D=4, F=3 and five experts, by name, in the backends' order."""
    arguments = {
        "x": _draw(4, 4), "w_up": _draw(5, 6, 4), "w_down": _draw(5, 4, 3), "token": _ids(0, 0, 2, 3),
        "expert": _ids(1, -1, 4, 1), "weight": _draw(4), "activation": "swiglu",
    }  # fmt: skip
    return {**arguments, **changes}


FLOATS = "bfloat16, float16, float32, float64"
ONES = torch.ones(4, device=DEVICE)
REFUSALS = {
    "bool ids": (
        {"expert": ONES.bool()},
        "takes expert and token_N in torch.int64; they are torch.bool, torch.int64.",
    ),
    "int32 ids": ({"expert": ONES.int()}, "expert and token_N in torch.int64; they are torch.int32, torch.int64."),
    "float ids": ({"expert": ONES}, "expert and token_N in torch.int64; they are torch.float32, torch.int64."),
    "int32 tokens": ({"token": ONES.int()}, "expert and token_N in torch.int64; they are torch.int64, torch.int32."),
    "float tokens": ({"token": ONES}, "expert and token_N in torch.int64; they are torch.int64, torch.float32."),
    "int64 weights": ({"weight": ONES.long()}, f"takes the rows' weights in one of {FLOATS}; they are torch.int64."),
    "bool weights": ({"weight": ONES.bool()}, f"takes the rows' weights in one of {FLOATS}; they are torch.bool."),
    "complex weights": ({"weight": ONES.cfloat()}, f"rows' weights in one of {FLOATS}; they are torch.complex64."),
    "int64 x": ({"x": _draw(4, 4).long()}, f"one of {FLOATS}; they are torch.int64, torch.float64, torch.float64."),
    "mixed floats": ({"w_up": _draw(5, 6, 4).float()}, "they are torch.float64, torch.float32, torch.float64."),
    "devices": ({"weight": torch.ones(4, device="meta")}, "takes operands on one device; they are on ["),
    "tokens of two dimensions": (
        {name: _rows()[name].view(2, 2) for name in ("token", "expert", "weight")},
        "takes expert and weight (T, K), or (N,) with token_N (N,); they are (2, 2), (2, 2), (2, 2).",
    ),
    "x of no dimension": ({"x": _draw()}, "w_down (E, D, F); they are (), (5, 6, 4), (5, 4, 3)."),
    "w_up of two dimensions": ({"w_up": _draw(5, 24)}, "w_down (E, D, F); they are (4, 4), (5, 24), (5, 4, 3)."),
    "more weights": ({"weight": _draw(5)}, "or (N,) with token_N (N,); they are (4,), (5,), (4,)."),
    "width": ({"w_down": _draw(5, 3, 3)}, "w_down (E, D, F); they are (4, 4), (5, 6, 4), (5, 3, 3)."),
    "a width of its own": ({"w_up": _draw(5, 5, 4)}, "w_up (E, 2F, D), w_down (E, D, F); they are (4, 4), (5, 5, 4), "),
    "activation": ({"activation": "relu"}, "activation='relu' is not one of swiglu, gelu, gelu_tanh, relu2"),
}


@BACKENDS
@pytest.mark.parametrize("case", REFUSALS)
def test_a_layers_operands_of_another_type_or_shape_are_refused_by_every_backend(backend, case):
    changes, sentence = REFUSALS[case]
    with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
        EXPERTS[backend](*_rows(**changes).values())
    assert str(refusal.value).startswith("activation=" if "activation" in changes else f"dispatch={backend} takes ")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_whatever_sorts_or_counts_rows_takes_int64_alone(dtype):
    expert = torch.zeros(4, dtype=dtype, device=DEVICE)
    for name, call in {
        "plan": lambda: plan(expert[:, None], None, 2, 16),
        "slots": lambda: grouped.slots(expert, 2),
        "count": lambda: reference.count(expert, 2),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} takes expert in torch\.int64; they are {dtype}\.$"):
            call()
    with pytest.raises(ValueError, match=r"^plan takes expert in torch\.int64"):
        reference.plan(expert, 2)


def test_a_plan_of_rows_that_do_not_lie_in_order_in_memory_is_refused():
    with pytest.raises(ValueError, match=r"^plan takes contiguous operands; expert is not\.$"):
        plan(_ids([0, 1], [2, 3]).T, None, 4, 16)
    with pytest.raises(ValueError, match=r"^plan takes expert \(N\), token_N \(N\); they are \(2, 2\), \(4,\)\.$"):
        plan(_ids([0, 1], [2, 3]), _ids(0, 0, 1, 1), 4, 16)


def _kernels():
    """Name -> (function, its operands by name, the rest of its arguments) of two tokens, D=4, F=3 and two experts."""
    where = plan(_ids([0, 1], [1, 1]), None, 2, 16)
    maps = {"slot": where.slot_N, "weight": _draw(4), "start": None, "offset": where.offset_E1}
    rest = (where, TILE, False)
    return {
        "up": (up, {"x": _draw(2, 4), "w_up": _draw(2, 6, 4)}, (where, "swiglu", TILE, False)),
        "down": (down, {"h": _draw(4, 3), "w_down": _draw(2, 4, 3)}, rest),
        "dh": (
            dh,
            {"dout": _draw(2, 4), "w_down": _draw(2, 4, 3), "z": _draw(4, 6), "weight": _draw(4)},
            (where, "swiglu", TILE, False),
        ),
        "dx": (dx, {"dz": _draw(4, 6), "w_up": _draw(2, 6, 4)}, rest),
        "ragged_wgrad": (ragged_wgrad, {"p": _draw(2, 4), "q": _draw(4, 3)}, (where, True, 2, TILE, False)),
        "combine": (combine, {"y": _draw(4, 4), **maps}, (2,)),
    }


@pytest.mark.parametrize("name", ["up", "down", "dh", "dx", "ragged_wgrad", "combine"])
def test_every_kernel_refuses_operands_of_another_type_shape_or_layout(name):
    function, floats, rest = _kernels()[name]
    function(*floats.values(), *rest)
    for key, tensor in floats.items():
        if tensor is None or not tensor.is_floating_point():
            continue
        cases = {f"{name} takes .*{key}.* in .*; it is torch.int64": tensor.long()}
        cases[rf"{name} takes .*{key}.*; they are .*\((1, |8,)"] = (
            tensor[None] if tensor.dim() > 1 else tensor.repeat(2)
        )
        if tensor.dim() > 1:
            layout = f"{name} takes contiguous operands; {key} is not"
            if key.startswith("w_"):
                layout = f"{name} takes {key} stored by rows or by columns; its strides are "
            cases[layout] = tensor.repeat_interleave(2, -1)[..., ::2]
        for sentence, wrong in cases.items():
            with pytest.raises(ValueError, match=f"^{sentence}"):
                function(*{**floats, key: wrong}.values(), *rest)
    if name == "dh":
        with pytest.raises(ValueError, match=r"^dh takes the z of w_down's F=3 and gelu; it is \(4, 6\)\.$"):
            dh(*floats.values(), rest[0], "gelu", TILE, False)
    if name == "combine":
        with pytest.raises(ValueError, match=r"^combine takes as many rows for every token, or start_T1; 4 are of 3"):
            combine(*floats.values(), 3)


@pytest.mark.parametrize("backend", GATES)
def test_a_gate_refuses_operands_and_choices_that_it_cannot_make(backend):
    choose, logits = GATES[backend], _draw(3, 4)
    for arguments, sentence in (
        ((logits, 5, "softmax"), "k=5 cannot be chosen in 1 of 1 equal groups of 4 experts."),
        ((logits, 3, "softmax", None, True, 1.0, 2, 1), "k=3 cannot be chosen in 1 of 2 equal groups of 4 experts."),
        ((logits, 1, "softmax", None, True, 1.0, 0, 1), "k=1 cannot be chosen in 1 of 0 equal groups of 4 experts."),
        ((logits, 1, "tanh"), "score='tanh' is not one of softmax, sigmoid"),
        ((logits[0], 1, "softmax"), "takes logits (T, E) and a bias (E,) or None; they are (4,), None."),
        ((logits, 1, "softmax", _draw(3)), "takes logits (T, E) and a bias (E,) or None; they are (3, 4), (3,)."),
        ((logits, 1, "softmax", _ids(0, 1, 2, 3)), "float16, float32, float64; they are torch.float64, torch.int64."),
        ((logits, 1, "softmax", torch.zeros(4, device="meta")), "takes operands on one device; they are on ["),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            choose(*arguments)


WRONG_ROWS = {
    "an expert that is not there": ({"expert": _ids(1, -1, 5, 1)}, "experts below 5; row 2 has 5."),
    "tokens out of order": ({"token": _ids(0, 2, 1, 3)}, "token_N ascending; row 2 has token 1 after 2."),
    "a token that is not there": ({"token": _ids(0, 0, 2, 4)}, "tokens 0 to 3; row 3 has 4."),
    "a token before the first": ({"token": _ids(-1, 0, 2, 3)}, "tokens 0 to 3; row 0 has -1."),
}


@BACKENDS
@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_debug_build_stops_at_rows_that_make_no_sense(backend, case, monkeypatch):
    changes, sentence = WRONG_ROWS[case]
    monkeypatch.setenv("TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match=re.escape(f"dispatch={backend} takes {sentence}")):
        EXPERTS[backend](*_rows(**changes).values())
    checked = EXPERTS[backend](*_rows().values())
    monkeypatch.delenv("TRITON_DEBUG")
    assert torch.equal(checked, EXPERTS[backend](*_rows().values()))


def test_a_debug_builds_plan_alone_stops_too_and_another_build_reads_no_row(monkeypatch):
    monkeypatch.setattr(operands, "_read_rows", None)
    expert = plan(_ids(1, 0, 0), _ids(0, 2, 1), 2, 16)
    assert expert.offset_E1.tolist() == [0, 2, 3]
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^plan takes token_N ascending; row 2 has token 1 after 2\.$"):
        plan(_ids(1, 0, 0), _ids(0, 2, 1), 2, 16)
    with pytest.raises(ValueError, match=r"^plan takes experts below 2; row 1 has 2\.$"):
        plan(_ids([1, 2], [0, 0]), None, 2, 16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_debug_build_reads_the_rows_of_a_graph_compiled_whole(backend, monkeypatch):
    monkeypatch.setenv("TRITON_DEBUG", "1")
    compiled = torch.compile(EXPERTS[backend], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*_rows().values()), EXPERTS[backend](*_rows().values()))
    with pytest.raises(ValueError, match=r"takes token_N ascending; row 2 has token 1 after 2\.$"):
        compiled(*_rows(token=_ids(0, 2, 1, 3)).values())


@pytest.mark.parametrize("name", ["x", "w_up", "w_down", "weight"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forward_mode_derivative_is_refused_where_there_is_none(backend, name):
    sentence = f"^dispatch={backend} has no forward-mode derivative; dispatch=reference does"
    arguments = _rows()
    tangent = torch.ones_like(arguments[name])
    function = lambda value: EXPERTS[backend](*{**arguments, name: value}.values())
    with pytest.raises(NotImplementedError, match=sentence):
        torch.func.jvp(function, (arguments[name],), (tangent,))
    with pytest.raises(NotImplementedError, match=sentence):
        torch.func.jacfwd(function)(arguments[name])
    for leaf in (arguments[name], arguments[name].clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=sentence):
            function(forward_ad.make_dual(leaf, tangent))
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    inner = lambda value: torch.func.jvp(lambda scale: scale * function(value), (one,), (one,))[1]
    with pytest.raises(NotImplementedError, match=sentence):  # of something else, within one of this
        torch.func.jvp(inner, (arguments[name],), (tangent,))
    inside = lambda scale: (scale * function(arguments[name])).sum()  # these are constants there
    assert torch.equal(torch.func.jvp(inside, (one,), (one,))[1], function(arguments[name]).sum())


def test_a_gates_forward_mode_derivative_is_refused_and_the_references_is_the_derivative():
    logits, direction = _draw(3, 4), _draw(3, 4).flip(0)
    with pytest.raises(NotImplementedError, match=r"^dispatch=triton has no forward-mode derivative"):
        torch.func.jvp(lambda value: gate(value, 2, "softmax")[1], (logits,), (direction,))
    for function, point, along in (
        (lambda value: reference.gate(value, 2, "softmax")[1], logits, direction),
        (lambda value: reference.experts(*_rows(x=value).values()), _rows()["x"], torch.ones(4, 4).to(_rows()["x"])),
    ):
        step = 1e-6 * along
        want = (function(point + step) - function(point - step)) / 2e-6
        torch.testing.assert_close(torch.func.jvp(function, (point,), (along,))[1], want, rtol=1e-6, atol=1e-8)
