"""Claims about the suite that measures what a trace takes."""

import json
from pathlib import Path

import pytest
import torch

from experiments.suites import tracing
from experiments.suites.tracing import measured, write_folder
from moe.convert.hf_weights import load
from moe.model.cost import size
from tests.experiments.bench_command import command


def test_a_row_has_the_peak_of_the_command_that_traced(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=tracing", "sizes=smoke", f"out={tmp_path / 'rows.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["measured"] * len(tracing.SMOKE)
    for row in rows:
        assert 50e6 < row["peak"] < tracing.LIMIT, "the libraries alone take more than the first"
        assert row["flops"] > 0
    assert "one at a time" in capsys.readouterr().out


def test_a_folder_has_a_file_per_block_and_is_read_whole(tmp_path: Path):
    traced = tracing.SMOKE[0]
    write_folder(tmp_path / "folder", traced.model())
    files = sorted(path.name for path in (tmp_path / "folder").glob("*.safetensors"))
    assert files == ["model-0.safetensors", "model-1.safetensors", "model-rest.safetensors"]
    model = load(tmp_path / "folder", dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.cfg.n_layers, model.cfg.moe.n_experts, model.cfg.moe.k) == (2, 8, 2)
    assert all((p == 1).all() if p.dim() == 1 else p.float().std() > 0.01 for p in model.parameters())


def test_a_trace_that_is_not_allowed_its_memory_fails():
    with pytest.raises(RuntimeError):
        measured(tracing.SMOKE[0]._replace(limit=50_000_000))


def test_the_large_folder_is_larger_than_what_its_trace_may_take():
    assert 2 * size(tracing.LARGE.model()).total > 4e9 >= 2 * tracing.LARGE.limit
    assert tracing.LARGE.stream
