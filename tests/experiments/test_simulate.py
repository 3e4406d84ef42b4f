"""Claims about the command that says what steps take on machines that are not here."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments import simulate as command
from experiments.stats.cluster import MachineConfig
from moe.analysis.trace import About, Batch, Writer
from moe.config.parse import check_values

SMALL = (
    "model=cpu-nano", "model.vocab_size=256", "model.context=64", "model.moe.n_experts=16", "model.moe.k=2",
    "gpus=[8,16]", "sample=64", "tokens=64", "matmul=bf16",
)  # fmt: skip


def _run(monkeypatch, capsys, *words):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["simulate", *words])
    command.main()
    return capsys.readouterr().out


def _refused(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simulate", *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    return capsys.readouterr().err.strip().splitlines()[-1]


def _trace(folder, n_experts=16, k=2, n_layers=2, n_tokens=640):
    generator = np.random.default_rng(0)
    about = About("r", "c", "f", 32, 64, list(range(n_layers)), [n_experts] * n_layers, k, ["d"], "all")
    text, nan = np.zeros((1, n_tokens), int), np.zeros((n_tokens, n_layers), np.float32)
    routes = np.argsort(generator.random((n_tokens, n_layers, n_experts)), -1)[..., :k]
    with Writer(folder, about) as writer:
        loss, weight = np.zeros((1, n_tokens), np.float32), np.zeros((n_tokens, n_layers, k), np.float32)
        writer.add(Batch(text, text, text, text, text, loss, routes, weight, nan, nan))
    return routes


@pytest.mark.parametrize("name", sorted(command.machines()))
def test_every_machine_says_all_of_itself_and_where_from(name):
    """One chosen over another leaves nothing of it, and every number has a source beside it or above."""
    text = (command.CONF / "machine" / f"{name}.yaml").read_text()
    machine = command.machines()[name]
    assert machine.name == name
    check_values(machine)
    for field in dataclasses.fields(MachineConfig):
        assert f"\n{field.name}:" in text, field.name
    assert "#" in text.splitlines()[0]
    assert text.count("hop:") == text.count("bandwidth:") == text.count("efficiency:") == 2


def test_routes_are_compared_at_every_size_and_kept(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    printed = _run(monkeypatch, capsys, *SMALL, f"out={out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    routing = [row for row in rows if row["kind"] == "routing"]
    assert {row["gpus"] for row in routing} == {8, 16}
    assert {row["loads"] for row in routing} == {"even", "Zipf 0.5"}
    assert {row["kind"] for row in rows} == {"routing", "effect"}
    assert f"{routing[0]['tokens_per_second']:,.0f}" in printed
    assert routing[0]["command"].startswith("python -m experiments.simulate model=cpu-nano")
    assert "overlap of shards" in printed


def test_a_layout_that_is_given_is_the_only_one(monkeypatch, capsys):
    printed = _run(monkeypatch, capsys, *SMALL, "parallel.replicate=2", "parallel.shard=16", "parallel.ep=8")
    assert "2 × 16, 8" in printed
    assert "1 × 8, 8" not in printed


def test_a_trace_drives_the_simulation_and_its_layers_take_turns(monkeypatch, capsys, tmp_path):
    routes = _trace(tmp_path / "t")
    printed = _run(monkeypatch, capsys, *SMALL, f"trace={tmp_path / 't'}", "model.n_layers=3", "gpus=[8]")
    assert "recorded" in printed
    worst, mean = 0, 0
    for layer in (0, 1, 0):
        counts = np.bincount(routes[: 64 * 8, layer].ravel(), minlength=16).reshape(8, 2).sum(1)
        worst, mean = worst + counts.max(), mean + counts.mean()
    assert f"{worst / mean:.2f}×" in next(line for line in printed.splitlines() if "recorded" in line)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("machine=h1000",), "machine=h1000"),
        (("parallel.shard=16", "parallel.ep=3"), "parallel.ep=3 does not divide parallel.shard=16"),
        (("parallel.shard=12",), "parallel.shard=12 must divide machine.gpus=8"),
        (("overlap_experts=-0.1",), "overlap_experts=-0.1 is out of range"),
        (("overlap_shards=1.5",), "overlap_shards=1.5 is out of range"),
        (("machine.network.efficiency=0",), "machine.network.efficiency=0.0 is out of range"),
        (("machine.nvlink.bandwidth=-1",), "machine.nvlink.bandwidth=-1.0 is out of range"),
        (("matmul=fp4",), "matmul=fp4 is not one of bf16, fp8"),
        (("matmul=fp8", "machine.peak_fp8=0"), "machine=h800 has peak_fp8=0"),
        (("gpus=[]",), "gpus=[] must be numbers"),
        (("gpus=[513]",), "gpus=513 is not divisible by the 512"),
        (("trace=nothing",), "nothing is no trace"),
        (("model.vocab_size=0",), "has no vocabulary: set model.vocab_size"),
        (("model.moe=null",), "model=cpu-nano is dense"),
        (("model.moe.precision=fp8",), "model.moe.precision=fp8 is not what is simulated: matmul=bf16 and matmul=fp8"),
        (("model.moe.n_null=1",), "experts that cost nothing"),
        (("model.moe.k_by_layer=[1,2]",), "has layers with other numbers"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(monkeypatch, capsys, words, sentence):
    assert sentence in _refused(monkeypatch, capsys, *SMALL, *words)


def test_a_trace_of_another_shape_is_refused(monkeypatch, capsys, tmp_path):
    _trace(tmp_path / "t", n_experts=8)
    refused = _refused(monkeypatch, capsys, *SMALL, f"trace={tmp_path / 't'}")
    assert "is of layers with [8] experts and K=2, and model=cpu-nano has 16 and K=2" in refused


def test_a_trace_that_is_too_short_is_refused(monkeypatch, capsys, tmp_path):
    _trace(tmp_path / "t", n_tokens=7)
    refused = _refused(monkeypatch, capsys, *SMALL, f"trace={tmp_path / 't'}")
    assert "the trace has 7 tokens, and parallel.ep=8 needs one each" in refused
