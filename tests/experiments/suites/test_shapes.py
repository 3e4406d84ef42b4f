"""Floors and targets: formulas against cases worked out by hand, and against the published table of floors."""

import pytest

from experiments.suites import shapes
from experiments.suites.shapes import Shape

TINY = Shape(T=2, D=5, F=7, E=3, K=1)


def test_flops_of_a_layer():
    assert shapes.forward_flops(TINY) == 2 * 3 * (2 * 1) * (5 * 7)  # two FLOPs per weight, three matrices, two rows
    assert shapes.forward_flops(shapes.SHAPES["olmoe"]) == 6 * 16384 * 8 * 1024 * 2048
    assert shapes.backward_flops(TINY) == 840


def test_bytes_of_every_kernel():
    assert shapes.gate_bytes(TINY) == 24 + 16 + 8 + 8 + 12  # logits; ids; weights; log-sum-exp; sums per expert
    assert shapes.gate_backward_bytes(TINY) == 68 + 24
    assert shapes.plan_bytes(TINY) == 16 + 3 * 8 + 16  # ids; two maps and tokens; offsets
    assert shapes.gate_plan_bytes(TINY) == 68 + 56 - 16  # the ids are not read again
    assert shapes.combine_bytes(TINY, weighted=True) == 20 + 20 + 8 + 8  # rows, result; slots, weights
    assert shapes.combine_bytes(TINY, weighted=False, itemsize=4) == 40 + 40 + 8
    assert shapes.layer_bytes(TINY) == 2 * (10 + 10 + 3 * 3 * 35)
    assert shapes.saved_bytes(TINY) == 10 + 28 + 32


@pytest.mark.parametrize(
    ("name", "forward_ms", "gate_plan_us", "combine_us"),
    [
        ("olmoe", 2.07, 2.4, 201),
        ("mixtral", 14.5, 0.4, 134),
        ("fine", 2.07, 3.8, 403),
        ("qwen3", 3.10, 7.7, 403),
        ("small", 0.39, 2.4, 84),
    ],
)
def test_floors_on_an_h100(name, forward_ms, gate_plan_us, combine_us):
    shape = shapes.SHAPES[name]
    assert 1e3 * shapes.forward_flops(shape) / 798e12 == pytest.approx(forward_ms, rel=0.01)
    assert 1e6 * shapes.gate_plan_bytes(shape) / 3e12 == pytest.approx(gate_plan_us, abs=0.2)
    assert 1e6 * shapes.combine_bytes(shape, weighted=True) / 3e12 == pytest.approx(combine_us, rel=0.01)


def test_every_shape_has_both_targets_and_the_moonshot_is_further():
    assert shapes.PROMISE.keys() == shapes.MOONSHOT.keys() == shapes.SHAPES.keys()
    for name, promise in shapes.PROMISE.items():
        assert shapes.MOONSHOT[name].forward > promise.forward
        assert shapes.MOONSHOT[name].backward > promise.backward


def test_a_target_is_met_from_its_bound_on_and_by_no_nan():
    assert shapes.target("speed", 2.0, 2.0)["met"]
    assert not shapes.target("speed", 1.9, 2.0)["met"]
    assert shapes.target("time", 2.0, 2.0, at_most=True)["met"]
    assert not shapes.target("time", 2.1, 2.0, at_most=True)["met"]
    assert not shapes.target("speed", float("nan"), 2.0)["met"]
    assert not shapes.target("time", float("nan"), 2.0, at_most=True)["met"]


def test_gate_and_plan_are_promised_up_to_their_bounds():
    assert shapes.gate_plan_promised(Shape(32768, 0, 0, 128, 8))
    for beyond in (Shape(32769, 0, 0, 128, 8), Shape(32768, 0, 0, 129, 8), Shape(32768, 0, 0, 128, 9)):
        assert not shapes.gate_plan_promised(beyond)
