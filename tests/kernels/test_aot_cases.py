"""What is compiled ahead of time leaves nothing out that a run may ask for."""

import itertools

from kernels import tuning
from kernels.aot_cases import CASES
from kernels.form import ACTIVATIONS, NAMED, Form
from kernels.quantized import FORMATS


def test_every_type_and_load_every_activation_and_every_part_of_a_form_has_a_layer():
    layers = [case for case in CASES if not case.stored]
    assert {(case.type, case.load) for case in layers} == set(itertools.product(tuning.TYPES, tuning.LOADS))
    assert {case.form.activation for case in layers} >= set(ACTIVATIONS) - {
        "relu2"
    }  # whose derivative is of gelu's kind
    assert set(NAMED.values()) <= {case.form for case in layers}
    plain = Form("swiglu")
    changed = {key for case in layers for key, value in case.form._asdict().items() if value != getattr(plain, key)}
    assert changed == set(Form._fields)


def test_every_format_has_a_layer_with_and_without_masks_and_of_wide_activations():
    for name in FORMATS:
        cases = [case for case in CASES if case.stored == name]
        assert {case.even for case in cases} == {False, True}
        assert {case.type for case in cases} == {"16bit", "fp32"}
