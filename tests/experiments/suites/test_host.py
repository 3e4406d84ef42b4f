"""Host time of a layer's call: nothing is launched, and what would be is counted."""

import pytest
import torch

from experiments.suites import cases, host
from kernels.ragged_mm import _ragged_mm
from tests import fake_cuda
from tests.experiments.bench_command import command

pytestmark = fake_cuda.interpreted
CPU = torch.device("cpu")


def test_a_row_for_each_way_to_name_rows_with_gradients_and_without(monkeypatch, tmp_path, capsys):
    out = tmp_path / "host.jsonl"
    command(monkeypatch, "suite=host", "sizes=smoke", f"out={out}")
    found = cases.read(out)
    assert [(row["rows"], row["grad"]) for row in found] == [
        ("tokens", False), ("tokens", True), ("listed", False), ("listed", True),
    ]  # fmt: skip
    for row in found:
        assert row["status"] == "measured", row
        assert row["forward_us"] > 0
        assert row["forward_launches"] == 6, "three of the plan, up, down, combine"
        assert row.get("backward_launches") == (5 if row["grad"] else None), "dh, two weight gradients, dx, combine"
        assert ("backward_us" in row) == row["grad"]
        assert 10 < row["forward_torch_calls"] < 60
    plain, listed = found[1], found[3]
    assert listed["forward_torch_calls"] > plain["forward_torch_calls"], "where a token's rows begin is searched for"
    assert "| (T, K) |" in capsys.readouterr().out


def test_a_kernel_that_is_launched_leaves_its_name_and_nothing_else():
    run = type(_ragged_mm).run
    with host.standing_in(CPU) as launches:
        forward, backward = host.layer(CPU, "tokens", True)
        backward(forward())
    matmuls = ["_ragged_mm"] * 2 + ["_combine", "_ragged_mm"] + ["_ragged_wgrad"] * 2 + ["_ragged_mm", "_combine"]
    assert launches == ["_count", "_scan", "_place", *matmuls]
    assert type(_ragged_mm).run is run


def test_operations_within_others_are_not_counted():
    assert host.torch_calls(lambda: torch.zeros(3) + 1) == 2
    assert host.torch_calls(lambda: None) == 0


def test_a_row_that_failed_has_its_reason():
    assert host.cells({"rows": "listed", "grad": True, "status": "failed", "error": "RuntimeError: no"})[2:] == (
        "failed", "", "", "", "", "RuntimeError: no",
    )  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
def test_a_row_in_the_table(grad):
    row = {"rows": "tokens", "grad": grad, "status": "measured", "forward_us": 376.4, "forward_torch_calls": 31}
    row |= {"forward_launches": 6, **({"backward_us": 325.0} if grad else {})}
    assert host.cells(row) == ("(T, K)", "yes" if grad else "no", "376", "31", "6", "325" if grad else "", "", "")
