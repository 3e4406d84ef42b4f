"""The benchmark times what it says, and refuses what it does not know."""

import json
import sys

import pytest
import torch

from experiments import bench

TINY = [
    "model.vocab_size=64", "model.context=16", "model.n_layers=2", "model.d_model=32", "model.n_heads=2",
    "model.d_ff=64", "model.moe.n_experts=4", "model.moe.k=2", "model.moe.d_expert=32", "batch_size=2", "rounds=1",
    "steps=2",
]  # fmt: skip


def run(monkeypatch, *overrides):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", *TINY, *overrides])
    bench.main()


def test_every_contestant_has_a_row_per_precision_with_where_it_ran(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    run(monkeypatch, "peers=[transformers]", f"out={out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["switchyard MoE", "switchyard dense twin", "transformers OLMoE", "transformers Llama (dense)"]
    assert [(row["precision"], row["model"]) for row in rows] == [(p, name) for p in ("fp32", "bf16") for name in names]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["steps"] == 2
        assert row["versions"]["torch"] == torch.__version__
        assert row["shape"] == {"batch": 2, "context": 16, "D": 32, "L": 2, "E": 4, "K": 2, "F": 32, "V": 64}
        assert {"commit", "dirty", "device", "threads", "command"} <= row.keys()
        assert f"{row['tokens_per_s']:,.0f}" in printed


def test_peers_have_the_parameters_of_what_they_are_compared_with(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, "peers=[transformers]", "precisions=[fp32]", f"out={out}")
    total = {row["model"]: row["parameters"] for row in map(json.loads, out.read_text().splitlines())}
    assert total["switchyard MoE"] == total["transformers OLMoE"]
    qk_norms = 2 * 2 * 32  # two layers, queries and keys, D: Llama has none
    assert total["switchyard dense twin"] == total["transformers Llama (dense)"] + qk_norms


def test_a_ratio_is_the_median_times_over_the_moes(monkeypatch, tmp_path):
    clock = iter([0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 2.0, 0.0, 10.0, 0.0, 4.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, "precisions=[fp32]", "steps=3", f"out={out}")
    moe, twin = (json.loads(line) for line in out.read_text().splitlines())
    assert moe["tokens_per_s"] == 2 * 16 / 2.0
    assert twin["tokens_per_s"] == 2 * 16 / 4.0
    assert (moe["moe_speed_over_this"], twin["moe_speed_over_this"]) == (1.0, 2.0)


def test_a_training_step_changes_the_weights(monkeypatch):
    cfg = bench.BenchConfig()
    cfg.model.context, cfg.model.vocab_size, cfg.model.d_model, cfg.model.n_layers = 8, 32, 32, 1
    model = bench.Transformer(cfg.model, bench.RouterConfig()).initialize(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(8)[None]
    bench.stepper(model, lambda: model(tokens).logits_BSV.square().mean(), tokens.device)("fp32")
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "router" not in name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite=kernel", "suite=kernel is not one of train_step"),
        ("peers=[megatron]", "peers has 'megatron'; known peers are transformers"),
        ("precisions=[fp8]", "precisions has 'fp8'; accepted are fp32, bf16"),
        ("model.moe=null", "model.moe=null"),
        ("rouds=2", "did you mean rounds"),
    ],
)
def test_what_it_does_not_know_is_refused(override, words, monkeypatch, capsys):
    arguments = [override] if "moe=null" in override else [*TINY, override]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert words in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_said_to_be_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "peers=[transformers]"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "not installed: pip install" in capsys.readouterr().err
