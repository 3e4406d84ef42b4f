"""What real checkpoints ask of the kernels: biases, gates in another order or cut off, weights on the input, matrices
by columns, experts that are another rank's; each against the reference in float64."""

import pytest
import torch

from kernels import grouped, reference
from kernels.form import NAMED, Form
from kernels.fused import experts
from tests.kernels.small_experts import call, layer_arguments, relative_errors, run_kernels, run_rows, wrong_results
from tests.kernels.test_plan import DEVICE, LOADS

FORMS = {
    "swiglu": Form("swiglu"),
    "gates in turns": Form("swiglu", interleaved=True),
    "gpt-oss": NAMED["swiglu_clipped"],
    "cut off, gates first": Form("swiglu", alpha=1.3, limit=2.0, shift=1.0),
    "cut off, not shifted": Form("swiglu", limit=2.0),
    "gelu": Form("gelu"),
    "relu2": Form("relu2"),
}
OF_ONE_KIND = ("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_every_gradient_are_the_references(form, weigh_input):
    """Of four ways to keep the weights two for each way to weigh: every pair of settings meets for every form."""
    like = FORMS[form]._replace(weigh_input=weigh_input)
    for biased in (False, True):
        by_columns = biased ^ weigh_input
        arguments = layer_arguments(LOADS["zipf"], form=like, biased=biased, by_columns=by_columns, d=20, f=36)
        assert wrong_results(arguments) == [], f"biased={biased}, by_columns={by_columns}"
        errors = relative_errors(run_rows(arguments, grouped.experts), run_rows(arguments, reference.experts))
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(*OF_ONE_KIND, ids=str)
@pytest.mark.parametrize(("form", "weigh_input"), [("gpt-oss", False), ("gates in turns", True), ("swiglu", True)])
def test_output_and_every_gradient_are_right_in_fewer_bits(form, weigh_input, dtype):
    like = FORMS[form]._replace(weigh_input=weigh_input)
    for by_columns in (False, True):
        arguments = layer_arguments(
            LOADS["zipf"], form=like, biased=True, by_columns=by_columns, d=36, f=28, dtype=dtype
        )
        assert wrong_results(arguments) == []


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["gpt-oss", "gelu"])
def test_biases_are_right_for_any_load(load, form):
    arguments = layer_arguments(LOADS[load], form=FORMS[form], biased=True)
    assert wrong_results(arguments) == []
    got = run_kernels(arguments)
    for e in range(5):
        has_rows = any(e in row for row in LOADS[load])
        assert got["b_up_EF"][e].any() == got["b_down_ED"][e].any() == has_rows


@pytest.mark.parametrize(("d", "f"), [(1, 1), (3, 17), (33, 5), (16, 64)])
def test_matrices_by_columns_are_right_for_odd_sizes(d, f):
    for form in ("swiglu", "gates in turns", "relu2"):
        assert wrong_results(layer_arguments(LOADS["zipf"], form=FORMS[form], by_columns=True, d=d, f=f)) == []


def test_the_other_order_of_gates_is_the_same_layer():
    """Turning w_up's rows from halves into turns changes nothing but the order of its gradient's rows."""
    plain = layer_arguments(LOADS["zipf"])
    turned = dict(plain, form=FORMS["gates in turns"])
    into_turns = lambda w: w.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()
    turned["w_up"] = into_turns(plain["w_up"]).requires_grad_()
    want, got = run_kernels(plain), run_kernels(turned)
    want["w_up"] = into_turns(want["w_up"])
    assert max(relative_errors(got, want).values()) < 1e-14


def test_weights_on_the_input_are_the_same_layer_of_weighted_rows():
    """Every row as a token of its own, multiplied before it comes: nothing of how the layer does it."""
    arguments = layer_arguments(LOADS["zipf"], form=Form("swiglu", weigh_input=True))
    out_TD = call(experts, arguments)[0]
    weight_TK, expert_TK = arguments["weight"].detach(), arguments["expert"]
    rows = (arguments["x"].detach()[:, None] * weight_TK[..., None]).flatten(0, 1)
    alone = dict(arguments, x=rows, expert=expert_TK.flatten()[:, None], form="swiglu")
    alone["weight"] = torch.ones(len(rows), 1, dtype=torch.float64, device=DEVICE)
    want_TD = call(experts, alone)[0].unflatten(0, expert_TK.shape).sum(1)
    torch.testing.assert_close(out_TD, want_TD, rtol=1e-12, atol=1e-12)


def test_ranks_that_share_experts_out_add_up_to_all_of_them():
    """Each rank has its experts alone, numbered from 0, and -1 for the rows of the others'."""
    arguments = layer_arguments(LOADS["zipf"], form=FORMS["gpt-oss"], biased=True)
    want, expert = run_kernels(arguments), arguments["expert"]
    parts = []
    for first, end in ((0, 2), (2, 5)):
        local = dict(arguments, expert=torch.where((expert >= first) & (expert < end), expert - first, -1))
        for name in ("w_up", "w_down", "b_up_EF", "b_down_ED"):
            local[name] = arguments[name].detach()[first:end].requires_grad_()
        parts.append(run_kernels(local))
    for name in ("out", "x", "weight"):
        torch.testing.assert_close(sum(part[name] for part in parts), want[name], rtol=1e-12, atol=1e-12)
    for name in ("w_up", "w_down", "b_up_EF", "b_down_ED"):
        assert torch.equal(torch.cat([part[name] for part in parts]), want[name])


def test_reruns_of_biases_are_bitwise_equal():
    arguments = layer_arguments(LOADS["zipf"], form=FORMS["gpt-oss"], biased=True, dtype=torch.bfloat16)
    first, second = run_kernels(arguments), run_kernels(arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


REFUSED = {
    "a bias of another width": (
        {"b_up_EF": torch.zeros(5, 12)},
        "takes b_up (5, 24), a number for each row; it is (5, 12).",
    ),
    "a bias of fewer experts": (
        {"b_down_ED": torch.zeros(4, 20)},
        "takes b_down (5, 20), a number for each row; it is (4, 20).",
    ),
    "a bias of another type": (
        {"b_up_EF": torch.zeros(5, 24).half()},
        "takes x and both weights, and biases in one of",
    ),
    "a bias with gaps": (
        {"b_down_ED": torch.zeros(5, 40)[:, ::2]},
        "takes a contiguous b_down; its strides are (40, 2).",
    ),
    "biases of w_up and weights on the input": (
        {"form": Form("swiglu", weigh_input=True)},
        "takes weights on the experts' input (weigh_input) without biases of w_up.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_in_a_sentence(case):
    changes, sentence = REFUSED[case]
    arguments = layer_arguments(LOADS["zipf"], biased=True, dtype=torch.float32)
    changes = {key: each.to(DEVICE) if torch.is_tensor(each) else each for key, each in changes.items()}
    with pytest.raises(ValueError, match="dispatch=triton takes") as refused:
        call(experts, {**arguments, **changes})
    assert sentence in str(refused.value)
