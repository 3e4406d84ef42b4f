"""Training steps: what a contestant's row says, and what is trained on a GPU."""

import sys

import torch

from experiments.suites import timing, train_step
from experiments.suites.cases import Rows, run
from tests import fake_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@fake_cuda.interpreted
def test_training_rows_of_a_gpu_are_made_two_models_at_a_time(monkeypatch, tmp_path):
    with fake_cuda.install(monkeypatch):
        settings = train_step.settings(CUDA, False, "", timing.ceilings(CUDA, full=False))
        settings.compiled, settings.backends, settings.peers = False, ("torch", "triton"), ()
        found = run(train_step.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CUDA)
    names = ["switchyard MoE (torch)", "switchyard MoE (triton)", "switchyard dense twin"]
    assert [(row["model"], row["status"]) for row in found] == [(name, "measured") for name in names]
    assert found[0]["moe_speed_over_this"] == 1
    assert all(row["mfu"] > 0 and row["preset"] == "smoke" for row in found)
    assert train_step.table(found)[1][0][0] == "smoke: switchyard MoE (torch)"


def test_a_training_step_changes_the_weights(monkeypatch):
    cfg = train_step.bench_model()
    cfg.context, cfg.vocab_size, cfg.d_model, cfg.n_layers = 8, 32, 32, 1
    model = train_step.Transformer(cfg, train_step.RouterConfig()).initialize(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(8)[None]
    train_step.stepper(model, lambda: model(tokens).logits_BSV.square().mean(), tokens.device)("fp32")
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "router" not in name)


def test_mfu_is_the_models_flops_over_the_matmul_rate_and_in_bf16_alone():
    settings = train_step.settings(CPU, False, "", timing.Ceilings(1.0, 1e6, 0.0))
    each = train_step.Contestant("m", 10, 500, lambda precision: None, {"bf16": [2.0], "fp32": [2.0]})
    found = train_step.row(each, each, "bf16", settings)
    assert found["tokens_per_s"] == 16 / 2.0
    assert found["mfu"] == 8.0 * 500 / 1e6
    assert "mfu" not in train_step.row(each, each, "fp32", settings)
    headings, (cells,) = train_step.table([found])
    assert (headings[-1], cells[-1]) == ("MFU", "0.4%")


def test_for_a_gpu_a_preset_is_trained_on_both_backends_with_peers():
    settings = train_step.settings(CUDA, True, "gpu-50m", None)
    assert (settings.model.name, settings.model.vocab_size, settings.precisions) == ("gpu-50m", 32768, ("bf16",))
    assert settings.batch_size * settings.model.context == 16384


def test_a_training_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    settings = train_step.settings(CPU, False, "", None)
    absent = [case for case in train_step.cases(settings) if case.key["model"] == "transformers OLMoE"]
    (row,) = run(absent, Rows(tmp_path / "r.jsonl", {}, resume=False), CPU)
    assert (row["status"], row["error"]) == ("absent", "transformers not installed")
    assert "absent" in train_step.table([row])[1][0]
