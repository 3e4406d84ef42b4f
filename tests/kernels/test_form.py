"""What an expert's form is, and what no expert computes."""

import math
import re

import pytest
import torch

from kernels import reference
from kernels.form import ACTIVATIONS, NAMED, Form, form_of

REFUSED = {
    "an unknown activation": (
        Form("relu"),
        "activation='relu' is not one of swiglu, gelu, gelu_tanh, relu2, sw",
    ),
    "a gate of gelu": (
        Form("gelu", interleaved=True),
        "activation=gelu has no gate: interleaved, alpha, limit",
    ),
    "a limit of relu2": (Form("relu2", limit=7.0), "they are False, 1.0, 7.0, 0.0."),
    "a limit below 0": (Form("swiglu", limit=-1.0), "a finite limit of 0 (none) or more; they are 1.0, 0.0, -1.0."),
    "an infinite alpha": (Form("swiglu", alpha=math.inf), "swiglu takes a finite alpha and shift"),
    "a shift that is no number": (Form("swiglu", shift=math.nan), "they are 1.0, nan, 0.0."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_no_expert_has_is_refused_in_a_sentence(case):
    wrong, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        form_of(wrong)


def test_a_name_is_the_form_of_that_activation_and_of_nothing_else():
    for name in ACTIVATIONS:
        assert form_of(name) == Form(name)
        assert form_of(Form(name, weigh_input=True)).weigh_input
    assert form_of("swiglu_clipped") == NAMED["swiglu_clipped"] == Form("swiglu", True, 1.702, 7.0, 1.0)
    assert [form_of(name).width(3) for name in ("swiglu", "swiglu_clipped", "gelu")] == [6, 6, 3]


@pytest.mark.parametrize(("alpha", "limit", "shift"), [(1.0, 0.0, 0.0), (1.702, 7.0, 1.0), (0.5, 2.0, 0.0)])
def test_swiglu_is_its_definition_column_by_column_in_either_order(alpha, limit, shift):
    z = 4 * torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.empty(3, 5, dtype=torch.float64)
    for row in range(3):
        for f in range(5):
            gate, up = z[row, f].item(), z[row, 5 + f].item()
            if limit:
                gate, up = min(gate, limit), max(-limit, min(up, limit))
            want[row, f] = gate / (1 + math.exp(-alpha * gate)) * (up + shift)
    in_turns = z.view(3, 2, 5).transpose(1, 2).reshape(3, 10)
    for order, given in ((False, z), (True, in_turns)):
        got = reference.activate(given, Form("swiglu", order, alpha, limit, shift))
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
