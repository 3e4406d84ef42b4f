"""The checks of single kernels: wrong ones are found."""

import pytest

from experiments.suites import kernel_checks
from experiments.suites.cases import Wrong
from kernels import quantized
from kernels.quantized import FORMATS
from tests import fake_cuda
from tests.experiments.suites.small_checks import SHAPE, small_settings

pytestmark = fake_cuda.interpreted


def test_a_plan_a_gate_or_a_matmul_that_is_wrong_is_found(monkeypatch):
    from kernels import gate, plan, ragged_mm

    settings = small_settings()
    assert kernel_checks.check_plan(settings, SHAPE, "", "ragged") == {}
    right_plan, right_gate, right_dh = plan.plan, gate.gate, ragged_mm.dh

    def swapped(*given):
        found = right_plan(*given)
        return found._replace(row_N=found.row_N.flip(0))

    monkeypatch.setattr(plan, "plan", swapped)
    with pytest.raises(Wrong, match="rows differ, block_m=32"):
        kernel_checks.check_plan(settings, SHAPE, "", "uniform")
    monkeypatch.setattr(plan, "plan", right_plan)

    for at, words in ((0, "other experts than the reference"), (1, None)):
        monkeypatch.setattr(gate, "gate", _spoilt(right_gate, at))
        if words:
            with pytest.raises(Wrong, match=words):
                kernel_checks.check_gate(settings, SHAPE, "fp32", kernel_checks.GATES[0])
        else:
            found = kernel_checks.check_gate(settings, SHAPE, "fp32", kernel_checks.GATES[0])
            assert "weight" in found["error"]

    monkeypatch.setattr(ragged_mm, "dh", _spoilt(right_dh, 2))
    found = kernel_checks.check_matmuls(settings, SHAPE, "fp32")
    assert "dweight" in found["error"]
    assert found["errors"]["dz"] < 1e-6


def _spoilt(function, at):
    """One of its results is off."""

    def wrapped(*given):
        results = list(function(*given))
        results[at] = (results[at] + 1) % 4 if at == 0 else results[at] * 1.01
        return tuple(results)

    return wrapped


@pytest.mark.parametrize("name", FORMATS)
def test_stored_experts_that_are_a_tenth_too_large_are_wrong(name, monkeypatch):
    assert "status" not in kernel_checks.check_stored(small_settings(), SHAPE, "bf16", name)
    right = quantized.experts

    def scaled(*operands, dispatch):
        y, counts = right(*operands, dispatch=dispatch)
        return (1.1 * y if dispatch == "triton" else y), counts

    monkeypatch.setattr(quantized, "experts", scaled)
    assert "errors exceed bounds: y" in kernel_checks.check_stored(small_settings(), SHAPE, "bf16", name)["error"]
