"""Claims about the command that says what a run will take."""

import json
import sys

import pytest

from experiments import plan as command
from moe.config.model import ModelConfig, MoEConfig
from moe.model import cost

TINY = (
    "model=cpu-nano", "model.context=32", "model.d_model=32", "model.d_ff=32", "model.moe.d_expert=16",
    "tokenizer.name=byte", "train.batch_size=4", "train.precision=fp32",
)  # fmt: skip


def _run(monkeypatch, capsys, *words):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    command.main()
    return capsys.readouterr().out


def _refused(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_weights_of_two_layers_of_llama_405b_alone_are_42_gigabytes(monkeypatch, capsys):
    words = ("model=llama3-405b", "model.context=64", "gpu=h100", "train.batch_size=1", "train.precision=fp32")
    out = _run(monkeypatch, capsys, *words, "model.n_layers=2")
    d, f, vocabulary = 16384, 53248, 128256
    n = 2 * vocabulary * d + d + 2 * (2 * d * (d + d // 16) + 3 * d * f + 2 * d)  # 8 of 128 heads have keys and values
    assert f"42.3 GB (4 bytes × {n:,})" in out
    assert "does not fit h100 with devices=1" in out
    assert "Then devices=3 hold the state between them, at the least." in out


def test_a_budget_of_flops_is_told_in_tokens(monkeypatch, capsys):
    moe = MoEConfig(n_experts=8, k=2, d_expert=16)
    model = ModelConfig("t", 257, 32, n_layers=2, d_model=32, n_heads=2, d_ff=32, qk_norm="head", moe=moe)
    out = _run(monkeypatch, capsys, *TINY, "budget=1e12", "tokenizer.vocab_size=257", "model.vocab_size=257")
    assert f"{1e12 / cost.flops(model).training:,.0f} tokens" in out
    assert "1.00e+12 FLOPs" in out


def test_time_is_told_by_steps_taken_here_by_rates_or_not_at_all(monkeypatch, capsys, tmp_path):
    assert "not told" in _run(monkeypatch, capsys, *TINY)
    assert "(measured here)" in _run(monkeypatch, capsys, *TINY, "measure=true")
    done = {"suite": "memory", "status": "measured", "written": 1e6}
    rows = [done | {"flops": 1e9 * i, "operations": 10 * i, "seconds_per_step": i} for i in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "(by the steps in" in _run(monkeypatch, capsys, *TINY, f"rates={tmp_path / 'rows.jsonl'}")


def test_a_gpu_of_the_table_has_a_time_and_a_price(monkeypatch, capsys):
    out = _run(monkeypatch, capsys, *TINY, "gpu=h100", "mfu=0.4", "price=2", "tokens=1e12", "devices=8")
    for words in ("(40% of h100's peak)", "at 2 per device and hour", "It fits h100."):
        assert words in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("gpu=h1000",), "gpu=h1000 is not one of"),
        (("mfu=0.4",), "say which with gpu="),
        (("gpu=h100", "measure=true"), "measure=true is of this machine"),
        (("tokens=1e9", "budget=1e9"), "give one"),
        (("rates=nothing.jsonl",), "rates=nothing.jsonl is no file"),
        (("devices=0",), "devices=0"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(monkeypatch, capsys, words, sentence):
    assert sentence in _refused(monkeypatch, capsys, *TINY, *words)


def test_rates_of_too_few_steps_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"suite": "memory", "status": "failed"}\n')
    assert "has 0 measured steps" in _refused(monkeypatch, capsys, *TINY, f"rates={tmp_path / 'rows.jsonl'}")


def test_a_trace_is_planned_from_settings_alone(monkeypatch, capsys):
    out = _run(monkeypatch, capsys, "model=mixtral-8x7b", "trace=1e5", "rate=1e12")
    assert "93.4 GB in bf16, read once" in out  # the published 46.7 billion parameters
    assert "5.8 GB in float32" in out  # 8 experts of 3 × 4096 × 14336, attention and norms
    # 2 × 12.9 billion active parameters × 100,000 tokens
    assert "42.9 minutes at 1.0e+12 FLOPs per second" in out
    assert "give rate=" in _run(monkeypatch, capsys, "model=mixtral-8x7b", "trace=1e5")
    assert "is dense and has no experts" in _refused(monkeypatch, capsys, "model=gpt2", "trace=1e5")
    assert "rate is of a trace" in _refused(monkeypatch, capsys, "rate=1e12")


def test_the_time_of_many_gpus_is_simulated_with_a_batch_on_each(monkeypatch, capsys):
    words = ("machine=h100", "parallel.replicate=2", "parallel.shard=4", "parallel.ep=4", "train.precision=bf16")
    out = _run(monkeypatch, capsys, *TINY[:-1], *words, "train.steps=100")
    assert "simulated on 8 GPUs of h100" in out
    assert f"{100 * 4 * 32 * 8:,} tokens, 100 steps" in out
    assert "each of 8 devices" in out
    assert "It fits h100." in out


def test_what_the_network_carries_makes_a_simulated_run_longer(monkeypatch, capsys):
    words = ("machine=h100", "parallel.shard=8", "parallel.ep=8", "train.precision=bf16", "tokens=1e9")
    fast, slow = (
        float(out.partition("| time ")[2].split("tokens/s")[0].split()[-1].replace(",", ""))
        for out in (
            _run(monkeypatch, capsys, *TINY[:-1], *words),
            _run(monkeypatch, capsys, *TINY[:-1], *words, "machine.nvlink.bandwidth=1e6"),
        )
    )
    assert slow < fast / 10


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("parallel.shard=8",), "say which with machine=NAME"),
        (("machine=h100", "gpu=h100"), "gpu=h100 and machine=h100 both say on what"),
        (("machine=h100", "devices=4"), "devices=4 and machine=h100 both say on what"),
        (("machine=h100",), "train.precision=fp32 is not simulated on machine=h100"),
        (
            ("machine=h100", "train.precision=bf16", "model.moe.precision=fp8"),
            "model.moe.precision=fp8 is not simulated on machine=h100: accepted is same.",
        ),
        (("machine=h100", "train.precision=bf16", "parallel.ep=2"), "parallel.ep=2 does not divide parallel.shard=1"),
        (("machine.gpus=4",), "machine is null here"),
        (("machine=h100", "machine.nvlink.efficiency=2"), "machine.nvlink.efficiency=2.0 is out of range"),
    ],
)
def test_a_machine_that_cannot_be_planned_for_is_refused(monkeypatch, capsys, words, sentence):
    assert sentence in _refused(monkeypatch, capsys, *TINY, *words)
