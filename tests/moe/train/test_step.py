"""Claims about one optimiser step: its gradients, its losses, and what routers learn from it."""

import copy
import dataclasses
import math
import os
import time
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import moe.train.loop
import moe.train.step
from moe.config.balance import SCHEDULED, BalanceConfig
from moe.data.loader import Batch
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.routing.contract import TAKEN
from moe.routing.token_choice import TopKRouter
from moe.run import checkpoint, machine
from moe.run.jsonl import read_lines
from moe.run.summary import MetricsLine, read_metrics
from moe.train.step import coefficient, compute_gradients
from tests.small_runs import settings, silent, train

DENSE = {"model.moe": None}


def lines_of(corpus, folder, changes: dict[str, Any]):
    """A run's metrics lines."""
    train(settings(corpus, folder, changes))
    return read_lines(folder / "metrics.jsonl")


def model_and_batch(corpus, changes: dict[str, Any]):
    """A config, its initial model in float64, and a batch of random tokens."""
    cfg = settings(corpus, "", changes | {"model.vocab_size": 257, "dispatch": "torch"})
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(0).double()
    tokens = torch.randint(0, 257, (8, 33), generator=torch.Generator().manual_seed(1))
    return cfg, model, Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(8, 32, dtype=torch.uint8))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_of_a_dense_model_are_those_of_the_whole_batch(parts, corpus):
    found = []
    for n in (1, parts):
        cfg, model, batch = model_and_batch(corpus, DENSE | {"train.accumulate": n, "train.batch_size": 8})
        gradients = compute_gradients(model, batch, cfg)
        found.append((gradients, {name: p.grad for name, p in model.named_parameters()}))
    (whole, whole_grads), (split, split_grads) = found
    for name in whole_grads:
        torch.testing.assert_close(split_grads[name], whole_grads[name], rtol=1e-9, atol=1e-12, msg=name)
    assert split.lm_loss == pytest.approx(whole.lm_loss, rel=1e-12)
    assert split.norm == pytest.approx(whole.norm, rel=1e-9)


def test_losses_and_counts_of_micro_batches_are_means_and_sums(corpus):
    """Against each micro-batch on its own: a balancing loss is of a micro-batch, its mean is of the step."""
    cfg, model, batch = model_and_batch(corpus, {"train.accumulate": 4, "train.batch_size": 8})
    result = compute_gradients(model, batch, cfg)
    alone = []
    for i in range(4):
        part = Batch(batch.tokens_BS[2 * i : 2 * i + 2], batch.targets_BS[2 * i : 2 * i + 2], batch.domain_BS)
        one = settings(corpus, "", {"train.accumulate": 1, "dispatch": "torch"})
        alone.append(compute_gradients(model, part, one))
    assert result.lm_loss == pytest.approx(sum(each.lm_loss for each in alone) / 4, rel=1e-12)
    for name in ("aux", "z"):
        assert result.losses[name] == pytest.approx(sum(each.losses[name] for each in alone) / 4, rel=1e-12)
    for layer in range(2):
        assert torch.equal(result.routing[layer].count_E, sum(each.routing[layer].count_E for each in alone))
        assert result.routing[layer].count_E.sum() == 8 * 32 * 2  # T tokens, K choices
        assert result.routing[layer].tokens == 8 * 32


def test_the_global_balancing_loss_of_micro_batches_is_the_whole_steps(corpus):
    """Value and gradient. The batch's own loss is another one as soon as the step has several micro-batches."""
    changes = {"train.batch_size": 8, "balance.aux": 0.5}
    found = {}
    for scope, n in (("global", 1), ("global", 4), ("batch", 1), ("batch", 4)):
        cfg, model, batch = model_and_batch(corpus, changes | {"balance.scope": scope, "train.accumulate": n})
        result = compute_gradients(model, batch, cfg)
        found[scope, n] = result.losses["aux"], {name: p.grad.clone() for name, p in model.named_parameters()}
    whole_loss, whole_gradients = found["batch", 1]
    for key in (("global", 1), ("global", 4)):
        assert found[key][0] == pytest.approx(whole_loss, rel=1e-12), key
        for name, gradient in whole_gradients.items():
            torch.testing.assert_close(found[key][1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert abs(found["batch", 4][0] / whole_loss - 1) > 1e-4


# Every term there is; of what scores it is a function is in the formulas that test_balance holds.
TERMS = {
    "importance": {"balance.importance": 0.5},
    "load": {"balance.load": 0.5, "router.noisy": True},
    "spread": {"balance.spread": 0.5},
    "bandpass": {"balance.bandpass": 0.5, "balance.band": 0.01},
    "l1": {"router.name": "relu", "router.l1": 0.5},
    "entropy": {"balance.entropy": 0.5},
    "aux": {"balance.aux": 0.0},  # logged all the same
    "depth": {"model.moe.depth": 0.5, "model.moe.depth_causal": "predictor", "balance.spread": 0.5},
    "default": {"router.gradient": "default-vector", "router.renormalize": False, "balance.importance": 0.5},
}
OF_A_BATCH = {"importance", "load", "spread", "bandpass", "l1", "aux"}  # not means over tokens


@pytest.mark.parametrize("name", TERMS)
def test_with_global_scope_every_term_is_the_whole_steps_whatever_it_is_split_into(name, corpus, monkeypatch):
    """Value and gradient, in all and in every layer. With the other scopes a step's loss is the mean over its parts."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.sin(1e3 * x.detach()))  # noise that no batching changes
    result, gradients = {}, {}
    for scope, n in (("global", 1), ("global", 4), ("batch", 1), ("batch", 4)):
        changes = TERMS[name] | {"balance.scope": scope, "train.batch_size": 8, "train.accumulate": n}
        cfg, model, batch = model_and_batch(corpus, changes)
        result[scope, n] = compute_gradients(model, batch, cfg)
        gradients[scope, n] = {key: p.grad for key, p in model.named_parameters()}
    whole = result["batch", 1]
    for key in (("global", 1), ("global", 4)):
        assert result[key].losses == pytest.approx(whole.losses, rel=1e-9)
        for layer, of_whole in zip(result[key].routing, whole.routing, strict=True):
            assert {term: value.item() for term, value in layer.losses.items()} == pytest.approx(
                {term: value.item() for term, value in of_whole.losses.items()}, rel=1e-9
            )
        for parameter, gradient in gradients["batch", 1].items():
            torch.testing.assert_close(gradients[key][parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)
    assert whole.losses[name] > 0
    differs = abs(result["batch", 4].losses[name] / whole.losses[name] - 1) > 1e-4
    assert differs == (name in OF_A_BATCH)


def test_the_losses_of_the_layers_add_up_to_the_steps(corpus, tmp_path):
    changes = {"balance.importance": 0.1, "train.accumulate": 2, "train.steps": 2, "model.moe.first_dense": 0}
    train(settings(corpus, tmp_path / "run", changes))
    for line in read_metrics(tmp_path / "run")[1:]:
        assert line.losses.keys() == {"aux", "z", "importance"}
        for name, value in line.losses.items():
            assert sum(layer.losses[name] for layer in line.layers) == pytest.approx(value, rel=1e-6)
        assert line.layers[0].losses != line.layers[1].losses


def _rank(rank: int, corpus, folder, changes) -> None:
    """One of two processes: its half of the batch, in two micro-batches."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cfg, model, batch = model_and_batch(corpus, changes)
    half = Batch(*(each.chunk(2)[rank] for each in (batch.tokens_BS, batch.targets_BS, batch.domain_BS)))
    result = compute_gradients(model, half, cfg)
    torch.save([result.losses, model.blocks[0].mlp.router.w_ED.grad], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of gloo's is still there at an exit, which then aborts


def test_the_global_balancing_losses_span_the_ranks(corpus, tmp_path):
    changes = {"train.batch_size": 8, "balance.aux": 0.5, "balance.scope": "global"}
    changes |= {"balance.importance": 0.5, "balance.bandpass": 0.5, "balance.band": 0.01}
    torch.multiprocessing.spawn(_rank, (corpus, tmp_path, changes | {"train.accumulate": 2}), nprocs=2)
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    cfg, model, batch = model_and_batch(corpus, changes)
    whole = compute_gradients(model, batch, cfg)
    for of_rank in losses:  # each has the step's
        assert of_rank == pytest.approx(whole.losses, rel=1e-9)
    expected = model.blocks[0].mlp.router.w_ED.grad
    torch.testing.assert_close(sum(gradients), expected, rtol=1e-9, atol=1e-12)


class Scalars(TorchDispatchMode):
    """Counts how often the host asks for a number of a tensor, which on a GPU it would have to wait for."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("n_layers", [1, 4])
def test_a_step_asks_the_device_for_its_numbers_once_however_many_layers_it_has(n_layers, corpus, monkeypatch):
    """As if the host had copies: after the transfer what is on the device is spoilt, and the metrics do not notice."""
    changes = {"model.n_layers": n_layers, "train.accumulate": 2, "balance.importance": 0.1}
    cfg, model, batch = model_and_batch(corpus, changes)
    expected = compute_gradients(copy.deepcopy(model), batch, cfg)
    asked = []

    def transfer(tensors):
        asked.append(scalars.n)
        copies = machine.to_host(tensors)
        for tensor in tensors:
            tensor.data.fill_(-7)
        return copies

    monkeypatch.setattr(moe.train.step, "to_host", transfer)
    with Scalars() as scalars:
        found = compute_gradients(model, batch, cfg)
    assert asked == [0]
    assert (found.lm_loss, found.total, found.norm, found.losses) == (
        expected.lm_loss, expected.total, expected.norm, expected.losses
    )  # fmt: skip
    for layer, of_expected in zip(found.routing, expected.routing, strict=True):
        assert torch.equal(layer.count_E, of_expected.count_E)
        assert (layer.dropped, layer.skipped, layer.losses) == (
            of_expected.dropped, of_expected.skipped, of_expected.losses
        )  # fmt: skip


def test_the_clock_is_read_when_the_device_is_done_with_the_optimisers_part(corpus, tmp_path, monkeypatch):
    events = []

    def note(event, function=lambda *arguments: None):
        return lambda *arguments, **keywords: (events.append(event), function(*arguments, **keywords))[1]

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (events.append("update"), step(self, *rest))[1])
    monkeypatch.setattr(moe.train.step, "synchronize", note("wait"))
    clock = types.SimpleNamespace(perf_counter=note("clock", time.perf_counter))
    monkeypatch.setattr(moe.train.step, "time", clock)
    train(settings(corpus, tmp_path / "run", {"train.steps": 2}))
    assert events == ["clock", "update", "wait", "clock"] * 2


LEARNING = {
    "bias": {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.125},
    "l1": {"router.name": "relu", "router.l1": 0.5, "balance.aux": 0.0, "balance.z": 0.0},
    "cut-offs": {"router.name": "expert-choice", "router.causal": "threshold"},
    "depth": {"model.moe.depth": 0.5},
}


def _learn(model, batch, cfg) -> dict[str, torch.Tensor]:
    """What the routers of a model know after a step."""
    moe.train.step.update_routers(model, compute_gradients(model, batch, cfg).routing, cfg.balance, 0.0)
    return {name: each for name, each in model.named_buffers() if "router." in name or "depth." in name}


def _learning_rank(rank: int, corpus, folder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, changes in LEARNING.items():
        cfg, model, batch = model_and_batch(corpus, changes | {"train.batch_size": 8})
        half = Batch(*(each.chunk(2)[rank] for each in (batch.tokens_BS, batch.targets_BS, batch.domain_BS)))
        torch.save(_learn(model, half, cfg), folder / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of gloo's is still there at an exit, which then aborts


def test_routers_learn_the_same_on_every_rank_and_what_the_whole_batch_teaches_one_process(corpus, tmp_path):
    torch.multiprocessing.spawn(_learning_rank, (corpus, tmp_path), nprocs=2)
    for name, changes in LEARNING.items():
        cfg, model, batch = model_and_batch(corpus, changes | {"train.batch_size": 8})
        before = {key: each.clone() for key, each in model.named_buffers()}
        expected = _learn(model, batch, cfg)
        assert any(not torch.equal(each, before[key]) for key, each in expected.items()), name
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert found.keys() == expected.keys()
            for key, each in expected.items():
                torch.testing.assert_close(found[key], each, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


def test_a_coefficient_follows_its_schedule():
    cfg = BalanceConfig(aux=0.5, z=0.25, schedule={"aux": [1.0, 0.0]})
    assert [coefficient(cfg, "aux", progress) for progress in (0.0, 0.5, 1.0)] == [0.5, 0.25, 0.0]
    assert coefficient(cfg, "z", 0.5) == 0.25
    assert coefficient(cfg, "l1", 0.5) == 1.0  # a router's own loss


class OwnLoss(TopKRouter):
    """Softmax top-K, with a loss of its own: the constant options.loss, called options.called."""

    def __init__(self, *arguments, **where):
        super().__init__(*arguments, **where)
        self.score = "softmax"

    def forward(self, x_TD, backend, context):
        loss = x_TD.new_tensor(self.cfg.options["loss"])
        return super().forward(x_TD, backend, context)._replace(losses={self.cfg.options["called"]: loss})


def _own_loss(corpus, name):
    own = {"router.name": f"{__name__}:OwnLoss", "router.options": {"loss": 3.0, "called": name}}
    cfg, model, batch = model_and_batch(corpus, own | {"balance.capacity": 2.0, "train.batch_size": 8})
    return compute_gradients(model, batch, cfg)


@pytest.mark.parametrize("name", ["mine", "capacity", "band", "tile", "scope", "schedule"])
def test_a_loss_of_a_routers_own_is_weighted_by_one_whatever_setting_it_is_called_like(name, corpus):
    result = _own_loss(corpus, name)
    aux, z = result.losses["aux"], result.losses["z"]
    assert result.losses[name] == 6.0, "3 in each of two layers"
    assert result.total == pytest.approx(result.lm_loss + 0.01 * aux + 0.001 * z + 6.0, rel=1e-12)


@pytest.mark.parametrize("name", ["aux", "z", "importance", "load", "bias_rate", "depth", "lm", "distill", "step"])
def test_a_loss_of_a_routers_own_that_is_called_like_another_number_of_the_step_is_refused(name, corpus):
    words = f"gives a loss named {name}, which is (balance.{name}'s|another number's)"
    with pytest.raises(BadInput, match=words):
        _own_loss(corpus, name)


def test_no_number_of_a_metrics_line_is_free_to_be_called_a_loss():
    assert {field.name for field in dataclasses.fields(MetricsLine)} | set(SCHEDULED) <= set(TAKEN)


def test_the_gradient_is_of_the_loss_with_the_weighted_balancing_losses(corpus):
    cfg, model, batch = model_and_batch(corpus, {"balance.aux": 0.3, "balance.z": 0.02})
    result = compute_gradients(model, batch, cfg)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    output = model(batch.tokens_BS, backend="reference")
    lm_loss = torch.nn.functional.cross_entropy(output.logits_BSV.flatten(0, 1), batch.targets_BS.flatten())
    loss = lm_loss + sum(0.3 * each.aux + 0.02 * each.z for each in output.routing)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert result.norm == pytest.approx(norm, rel=1e-9)


def test_clipping_scales_the_gradient_to_the_limit_and_leaves_a_small_one(corpus):
    _, model, _ = model_and_batch(corpus, {})
    for limit, norm_after in ((0.5, 0.5), (5.0, 2.0)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.norm.weight.grad[0] = 2.0
        moe.train.step.clip(model, 2.0, limit)
        assert model.norm.weight.grad.norm().item() == pytest.approx(norm_after)


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_the_update_gets_the_clipped_gradient_and_the_log_the_norm_before(limit, corpus, tmp_path, monkeypatch):
    norms = []

    def spy(optimizer, *arguments):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return step(optimizer, *arguments)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    logged = [line["grad_norm"] for line in lines_of(corpus, tmp_path / "run", {"optim.clip": limit})[1:]]
    assert max(logged) > 0.3
    assert norms == pytest.approx([min(norm, limit) if limit else norm for norm in logged], rel=1e-5)


def test_the_selection_bias_moves_against_the_load(corpus, tmp_path):
    changes = {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.25, "train.steps": 2}
    train(settings(corpus, tmp_path / "run", changes | {"log.every": 1}))
    counts = [line["counts"] for line in read_lines(tmp_path / "run" / "routing" / "counts.jsonl")]
    snapshot = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", silent))
    for layer in range(2):
        steps = [torch.tensor(step[layer], dtype=torch.float64) for step in counts]
        expected = sum(0.25 * torch.sign(count.mean() - count) for count in steps)
        assert snapshot.model[f"blocks.{layer}.mlp.router.bias_E"].tolist() == expected.tolist()


# What the doctor is told


def test_what_is_seen_of_a_step_is_what_its_micro_batches_routers_had(corpus):
    cfg, model, batch = model_and_batch(corpus, {"train.accumulate": 2, "train.batch_size": 8})
    logits: list[list[torch.Tensor]] = [[], []]
    for router, kept in zip(model.routers(), logits, strict=True):
        router.register_forward_hook(lambda module, given, routing, kept=kept: kept.append(routing.logits_TE))
    result = compute_gradients(model, batch, cfg, measured=True)
    for kept, layer, block in zip(logits, result.routing, model.blocks, strict=True):
        prob_TE = torch.cat(kept).detach().softmax(-1)
        assert len(prob_TE) == 8 * 32
        torch.testing.assert_close(layer.seen["prob"], prob_TE.sum(0), rtol=1e-6, atol=0)
        entropy = -(prob_TE * prob_TE.log()).sum()
        assert layer.seen["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
        experts = block.mlp.experts
        norms = [math.hypot(experts.w_up_EFD.grad[e].norm(), experts.w_down_EDF.grad[e].norm()) for e in range(4)]
        assert layer.seen["gradient"].tolist() == pytest.approx(norms, rel=1e-5)
    assert all("gradient" not in layer.seen for layer in compute_gradients(model, batch, cfg).routing)


def test_without_a_doctor_nothing_is_seen_and_the_training_is_the_same_bit_for_bit(corpus):
    results = []
    for doctor in (True, False):
        cfg, model, batch = model_and_batch(corpus, {"log.doctor": doctor, "train.batch_size": 8})
        result = compute_gradients(model, batch, cfg, measured=doctor)
        results.append((result.total, result.norm, [p.grad for p in model.parameters()]))
        assert all(bool(layer.seen) == doctor for layer in result.routing)
    (total, norm, grads), (other_total, other_norm, other_grads) = results
    assert (total, norm) == (other_total, other_norm)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_the_selection_bias_is_told_as_it_was_in_the_step(corpus):
    changes = {"router.name": "sigmoid", "router.selection_bias": True, "router.renormalize": True, "balance.aux": 0.0}
    cfg, model, batch = model_and_batch(corpus, changes)
    model.routers()[1].bias_E[2] = -0.5
    seen = [layer.seen["bias"].tolist() for layer in compute_gradients(model, batch, cfg).routing]
    assert seen == [[0.0] * 4, [0.0, 0.0, -0.5, 0.0]]


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_the_loss_is_per_target_however_unevenly_micro_batches_have_them(parts, corpus):
    cfg, model, batch = model_and_batch(corpus, DENSE | {"train.accumulate": parts, "train.batch_size": 8})
    keep = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.9, 8)[:, None]
    batch.targets_BS = torch.where(keep, batch.targets_BS, -1)
    assert not keep[0].any()
    found = compute_gradients(model, batch, cfg)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    # In one go, by the definition.
    model.zero_grad()
    log_prob = model(batch.tokens_BS).logits_BSV.log_softmax(-1)
    loss = -log_prob.gather(-1, batch.targets_BS.clamp(min=0)[..., None])[..., 0][keep].mean()
    loss.backward()
    assert found.lm_loss == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_teacher_is_heard_where_there_is_a_target_alone(parts, corpus):
    changes = {"train.accumulate": parts, "train.batch_size": 8, "distill.teacher": "runs/x", "distill.weight": 0.5}
    cfg, model, batch = model_and_batch(corpus, DENSE | changes)
    keep = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.9, 8)[:, None]
    batch.targets_BS = torch.where(keep, batch.targets_BS, -1)
    teacher = Transformer(cfg.model, cfg.router).initialize(1).double()
    found = compute_gradients(model, batch, cfg, teacher=teacher)
    ours, theirs = (of(batch.tokens_BS).logits_BSV.log_softmax(-1)[keep] for of in (model, teacher))
    assert found.losses["distill"] == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-6)


def test_targets_are_counted_over_the_ranks(monkeypatch):
    """Two ranks of 30 and 10 targets of 64 tokens: a micro-batch's share is by their mean, so that the mean of both
    ranks' gradients is per target of all."""
    batch = lambda n: Batch(torch.zeros(2, 32), torch.tensor([1] * n + [-1] * (64 - n)).view(2, 32), torch.zeros(2, 32))
    monkeypatch.setattr(moe.train.step, "n_ranks", lambda: 2)
    monkeypatch.setattr(moe.train.step, "summed_over_ranks", lambda value: torch.tensor(40))
    assert moe.train.step.targets_of_step(batch(30), 1) == moe.train.step.targets_of_step(batch(10), 1) == 20
    assert moe.train.step.targets_of_step(batch(30), 4) == 5
    # One rank of whole text and one of half: neither is taken for whole.
    monkeypatch.setattr(moe.train.step, "summed_over_ranks", lambda value: torch.tensor(96))
    assert moe.train.step.targets_of_step(batch(64), 1) == 48
