"""Claims about which precision a run takes; no timing of this machine decides any."""

import types

import pytest
import torch

from moe.config.run import build
from moe.run import precision
from moe.run.folder import read_config
from moe.run.precision import ROUNDS, Matmul, choose_precision, matmuls
from tests.small_runs import settings, train, train_until

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 50, "context": 16, "n_layers": 2, "d_model": 12, "n_heads": 3, "n_kv_heads": 1, "head_dim": 6,
    "d_ff": 20, "moe": {"n_experts": 8, "k": 2, "d_expert": 10, "n_shared": 1, "first_dense": 1},
}  # fmt: skip


def _config(**train):
    return build({"model": SHAPE, "train": {"batch_size": 4, **train}})


def test_the_faster_one_is_taken_and_both_numbers_are_said():
    """Every bf16 matmul takes half or twice as long as its fp32."""
    n = sum(matmuls(_config()).values())
    for speed, choice, said in ((2.0, "bf16", "0.5 s in bf16 and 1 s"), (0.5, "fp32", "1 s in fp32 and 2 s")):
        seconds = lambda matmul, name, speed=speed: 1 / n / (speed if name == "bf16" else 1)
        found, why = choose_precision(_config(), CPU, seconds)
        assert found == choice
        assert why.startswith(f"the matmuls of a step take {said}")


def test_what_there_is_more_of_decides():
    """bf16 is faster at one expert's matmul alone, of which there are eight, and slower by less at the others."""
    assert {matmul.rows for matmul in matmuls(_config())} == {16, 64}  # of an expert, and of every token
    chosen = []
    for gain in (1.8, 1.01):
        seconds = lambda matmul, name, gain=gain: 1.0 if name == "bf16" else (gain if matmul.rows == 16 else 0.9)
        chosen.append(choose_precision(_config(), CPU, seconds)[0])
    assert chosen == ["bf16", "fp32"]


def test_the_median_counts_and_the_first_time_does_not():
    """The first of a shape is a hundred times as slow in bf16, one of the others ten times as fast."""
    n_of: dict[tuple[Matmul, str], int] = {}

    def seconds(matmul, name):
        n_of[matmul, name] = n_of.get((matmul, name), -1) + 1
        return 2.0 if name == "fp32" else [100.0, 3.0, 0.6, 3.0][n_of[matmul, name]]

    assert choose_precision(_config(), CPU, seconds)[0] == "fp32"
    assert set(n_of.values()) == {ROUNDS}


def test_a_race_that_is_none_is_over_after_one_round():
    asked = []
    choose_precision(_config(), CPU, lambda matmul, name: asked.append(name) or {"fp32": 1.0, "bf16": 20.0}[name])
    assert len(asked) == len(matmuls(_config())) * 2 * 2


def test_the_matmuls_are_the_models_own():
    """4 sequences of 16 tokens in two micro-batches; counted by hand."""
    assert matmuls(_config(accumulate=2)) == {
        Matmul(32, 12, 18): 4, Matmul(32, 18, 12): 4, Matmul(32, 12, 6): 8,  # two layers' q, o, and k with v
        Matmul(32, 12, 40): 2, Matmul(32, 20, 12): 2,  # one dense MLP, gate and up projection side by side
        Matmul(8, 12, 20): 16, Matmul(8, 10, 12): 16,  # eight experts of 32 · 2 / 8 rows
        Matmul(32, 12, 20): 2, Matmul(32, 10, 12): 2,  # the shared one
        Matmul(32, 12, 50): 2,
    }  # fmt: skip


def test_two_projections_of_one_shape_are_two():
    """Heads as wide as the model, and latent attention."""
    square = {"head_dim": 4, "n_kv_heads": 0, "moe": None, "n_layers": 1}
    assert matmuls(build({"model": SHAPE | square, "train": {"batch_size": 4}}))[Matmul(64, 12, 12)] == 4
    latent = {"kv_rank": 5, "q_rank": 6, "nope_dim": 3, "rope_dim": 4, "v_dim": 7}
    found = matmuls(build({"model": SHAPE | square | {"head_dim": 0, "latent": latent}, "train": {"batch_size": 4}}))
    attention = [(12, 6), (6, 21), (12, 9), (5, 30), (21, 12)]
    mlp = [(12, 40), (20, 12), (12, 50)]
    assert found == {Matmul(64, *channels): 1 for channels in (*attention, *mlp)}


def test_a_large_matmul_is_timed_by_fewer_rows_of_it_and_counted_whole():
    cfg = build({"model": SHAPE | {"moe": None, "vocab_size": 10**6}, "train": {"batch_size": 4096}})
    largest, asked = max(matmuls(cfg), key=Matmul.size), []
    seconds = lambda matmul, name: asked.append(matmul) or 1e-9 * matmul.size()
    _, why = choose_precision(cfg, CPU, seconds)
    assert max(map(Matmul.size, asked)) <= precision.MULTIPLICATIONS
    assert largest.small() in asked
    assert f"{1e-9 * sum(matmul.size() * n for matmul, n in matmuls(cfg).items()):.3g} s in fp32" in why


def test_what_is_asked_for_and_a_gpu_are_not_timed(monkeypatch):
    untimed = lambda *arguments: pytest.fail("timed")
    for name in ("bf16", "fp32"):
        assert choose_precision(_config(precision=name), CPU, untimed) == (name, "as asked")
    for native, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision(_config(), torch.device("cuda"), untimed)[0] == name


def test_a_timing_is_of_the_forward_and_the_backward_pass(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(precision, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    backward, dtypes = torch.Tensor.backward, []
    spy = lambda y, gradient: (dtypes.append(y.dtype), backward(y, gradient))
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    assert precision.timed(Matmul(3, 4, 5), "bf16") == 2.5
    assert dtypes == [torch.bfloat16]


def test_the_choice_is_said_once_and_kept_on_resuming(corpus, tmp_path, monkeypatch):
    times = {"bf16": 1.0, "fp32": 2.0}
    monkeypatch.setattr(precision, "timed", lambda matmul, name: times[name])
    said: list[str] = []
    cfg = settings(corpus, tmp_path / "run", {"train.precision": "auto", "train.steps": 3})
    train_until(cfg, 2)
    assert read_config(tmp_path / "run").train.precision == "bf16"
    times["fp32"] = 0.5  # another machine, or a busy one
    cfg.resume = True
    assert train(cfg, said.append).precision == "bf16"
    assert not [line for line in said if line.startswith("precision:")]
    other = settings(corpus, tmp_path / "other", {"train.precision": "auto", "train.steps": 2})
    assert train(other, said.append).precision == "fp32"
    (line,) = [line for line in said if line.startswith("precision:")]
    assert line.startswith("precision: fp32, because the matmuls of a step take ")
