"""Objectives in the one loop: what a step draws, minimises and says, and that a run is resumed bitwise."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from moe.data.answer_loader import PairLoader, Prompts, rows_of
from moe.data.loader import NO_TARGET
from moe.errors import BadInput
from moe.eval.rollout import rollout
from moe.model.transformer import load_model, model_tensors
from moe.run.jsonl import read_lines
from moe.run.load import load_run
from moe.train import objective
from moe.train.objective import Companions, answer_loss, draw_answers, flips, micro_batch, prepare_objective, read
from moe.train.step import compute_gradients
from tests.small_models import BYTES
from tests.small_runs import fate, settings, train, train_until

CLEAN = {
    "data.clean.html": False, "data.clean.unicode": "none", "data.clean.min_chars": 0, "data.clean.max_repetition": 1.0,
    "data.clean.exact": False, "data.clean.near": 0.0,
}  # fmt: skip
SMALL = CLEAN | {"balance.aux": 0.0, "balance.z": 0.0, "train.steps": 4, "checkpoint.every": 2, "train.eval_every": 0}
ROWS = [(f"{i % 7}{'+' * (i % 3)}{i}=", "ab"[i % 2], "zzz") for i in range(120)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with rows of both kinds, and a run `sft` that the others start from."""
    folder = tmp_path_factory.mktemp("objective")
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS]
    prompts = [{"prompt": p, "answer": c} for p, c, _ in ROWS]
    for name, rows in (("preferences", pairs), ("prompts", prompts)):
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(configured(folder, "sft", "prompts", {"train.steps": 30, "optim.lr": 0.01}))
    return folder


def configured(folder: Path, run: str, data: str, changes=None):
    about = {"data.name": data, "data.path": str(folder / data), "data.cache": str(folder / "cache")}
    return settings(folder, folder / run, SMALL | about | (changes or {}))


def dpo(folder, run, **changes):
    about = {"objective.name": "dpo", "source": str(folder / "sft")}
    return configured(folder, run, "preferences", about | changes)


def grpo(folder, run, **changes):
    """Of a reward that a model which knows little gets now and then."""
    about = {
        "objective.name": "grpo", "source": str(folder / "sft"), "objective.group": 4, "objective.max_new": 6,
        "objective.reward": "contains", "train.batch_size": 16,
    }  # fmt: skip
    return configured(folder, run, "prompts", about | changes)


def opened(folder, cfg):
    """The source's model, as a run of `cfg` has it at its beginning, its companions and a step's prompts."""
    model, tokenizer, source = load_run(folder / "sft", "last")
    cfg.model, cfg.source = source.model, str(next((folder / "sft" / "checkpoints").glob("*30")))
    cfg.dispatch = "torch"
    companions = prepare_objective(cfg, tokenizer, None, torch.device("cpu"))
    prompts = Prompts([tokenizer.encode(p) for p, _, _ in ROWS[:4]], [a for _, a, _ in ROWS[:4]])
    return model.train(), companions, prompts


@pytest.mark.parametrize("make", [dpo, grpo])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(base, make):
    train(make(base, f"whole-{make.__name__}"))
    train_until(make(base, f"killed-{make.__name__}"), 4)
    train(make(base, f"killed-{make.__name__}", resume=True))
    assert fate(base / f"killed-{make.__name__}") == fate(base / f"whole-{make.__name__}")


def test_the_first_step_of_dpo_is_the_logarithm_of_2(base):
    cfg = dpo(base, "first-dpo", **{"train.steps": 2})
    train(cfg)
    first, second = read_lines(base / "first-dpo" / "metrics.jsonl")[1:]
    assert first["dpo"] == first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["answers"] | {"accuracy": 0, "flips": 0, "length": 2} == {
        "accuracy": 0, "chosen": 0, "rejected": 0, "length": 2, "flips": 0,
    }  # fmt: skip
    assert second["dpo"] < first["dpo"]


def test_a_summary_counts_the_places_that_the_rows_had(base):
    cfg = dpo(base, "counted", **{"train.steps": 3})
    summary = train(cfg)
    loader = PairLoader(None, rows_of(cfg.data, "train"), BYTES, 4, 32, cfg.data_seed())
    assert summary.tokens == sum(loader.batch(step).targets_BS.numel() for step in range(3))


def test_a_reward_model_learns_who_is_preferred_and_judges_answers(base):
    about = {"objective.name": "reward", "source": str(base / "sft"), "train.steps": 40, "optim.lr": 0.01}
    train(configured(base, "judge", "preferences", about))
    lines = read_lines(base / "judge" / "metrics.jsonl")[1:]
    assert lines[0]["reward"] == pytest.approx(math.log(2), abs=0.5)
    assert lines[-1]["answers"]["accuracy"] == 1
    assert lines[-1]["reward"] < 0.1
    model, _, _ = load_run(base / "judge", "last")
    assert model.reward is not None
    # The same answers, judged by it.
    cfg = grpo(base, "judged", **{"objective.reward": "model", "objective.judge": str(base / "judge")})
    train(cfg)
    figures = read_lines(base / "judged" / "metrics.jsonl")[1]["answers"]
    assert figures["gap"] == pytest.approx(figures["reward"] - figures["exact"])


def test_a_reward_head_is_trained_whatever_else_is_frozen(base):
    about = {
        "objective.name": "reward",
        "source": str(base / "sft"),
        "tune.rank": 2,
        "train.steps": 40,
        "optim.lr": 0.05,
    }
    train(configured(base, "low-rank", "preferences", about))
    assert read_lines(base / "low-rank" / "metrics.jsonl")[-1]["answers"]["accuracy"] == 1
    model, _, _ = load_run(base / "low-rank", "last")
    source, _, _ = load_run(base / "sft", "last")
    assert torch.equal(model.embed.weight, source.embed.weight)


def test_a_reward_is_read_where_the_end_of_the_answer_was(base):
    """And not where padding is: a row alone has the reward that it has beside a longer one."""
    cfg = configured(base, "x", "preferences", {"objective.name": "reward", "source": str(base / "sft")})
    model, _, _ = load_run(base / "sft", "last")
    model.reward = torch.nn.Linear(model.cfg.d_model, 1, bias=False)
    tokens = torch.tensor([[1, 2, 3, 256], [4, 5, 256, 256]])
    targets = torch.tensor([[NO_TARGET, 3, 256, NO_TARGET], [5, 256, NO_TARGET, NO_TARGET]])
    together = read(model, tokens, targets, cfg, backend="reference")[1]
    alone = read(model, tokens[1:, :3], targets[1:, :3], cfg, backend="reference")[1]
    torch.testing.assert_close(together[1:], alone)
    by_hand = model.states(tokens[1:, :3], backend="reference")[0][0, 2] @ model.reward.weight[0]
    torch.testing.assert_close(alone[0], by_hand)


def test_answers_are_drawn_by_the_seed_and_the_step_alone(base):
    cfg = grpo(base, "x")
    model, companions, prompts = opened(base, cfg)
    first, again, later = (draw_answers(model, prompts, companions, cfg, step) for step in (1, 1, 2))
    assert torch.equal(first.tokens_BS, again.tokens_BS)
    assert first.tokens_BS.shape != later.tokens_BS.shape or not torch.equal(first.tokens_BS, later.tokens_BS)
    assert model.training


def test_a_step_of_grpo_is_the_policy_gradient_of_its_answers(base):
    """Against log-probabilities and sums of one's own, over all parameters."""
    cfg = grpo(base, "x", **{"objective.normalize": "dapo", "objective.kl": 0.0})
    model, companions, prompts = opened(base, cfg)
    batch = draw_answers(model, prompts, companions, cfg, 1)
    found = compute_gradients(model, batch, cfg, companions=companions)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    log_prob = torch.log_softmax(model(batch.tokens_BS, backend="torch").logits_BSV, -1)
    total, n_tokens = 0.0, int((batch.targets_BS != NO_TARGET).sum())
    for b, s in (batch.targets_BS != NO_TARGET).nonzero().tolist():
        total = total - batch.advantage_B[b] * log_prob[b, s, batch.targets_BS[b, s]] / n_tokens
    total.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)
    assert found.answers["far"] == 0
    assert found.answers["ratio"] < 1e-4
    assert found.answers["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("normalize", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_a_step_is_the_same_in_one_part_and_in_several(base, normalize, kl):
    found = {}
    for n in (1, 4):
        cfg = grpo(base, "x", **{"train.accumulate": n, "objective.normalize": normalize, "objective.kl": kl})
        model, companions, prompts = opened(base, cfg)
        with torch.no_grad():
            model.head.weight.mul_(1.1)  # no longer the source
        batch = draw_answers(model, prompts, companions, cfg, 1)
        result = compute_gradients(model, batch, cfg, companions=companions)
        found[n] = result.total, result.answers["kl"], [p.grad for p in model.parameters() if p.grad is not None]
    assert found[1][0] == pytest.approx(found[4][0], rel=1e-4, abs=1e-6)
    assert found[1][1] == pytest.approx(found[4][1], rel=1e-4)
    assert found[1][1] > 0
    torch.testing.assert_close(found[1][2], found[4][2], rtol=1e-3, atol=1e-6)


def test_the_experts_of_a_draw_are_taken_again_where_they_are_replayed(base):
    """Here the drawing model had other weights: alone, training would choose other experts."""
    shares = {}
    for replay in (False, True):
        cfg = grpo(base, "x", **{"objective.replay": replay})
        model, companions, prompts = opened(base, cfg)
        batch = draw_answers(model, prompts, companions, cfg, 1)
        with torch.no_grad():
            for router in model.routers():
                router.w_ED.add_(0.3 * torch.randn(router.w_ED.shape, generator=torch.Generator().manual_seed(0)))
        part = micro_batch(batch, 0, 1, torch.device("cpu"))
        recorded = objective.replayed(batch, cfg, torch.device("cpu"))
        output, _ = read(model, part.tokens_BS, part.targets_BS, cfg, backend="torch", recorded=recorded)
        shares[replay] = answer_loss(output, None, part, companions, cfg)[1]["flips"].item()
    assert shares[True] == 0
    assert shares[False] > 0.05


def test_flips_are_counted_over_what_is_read_and_not_by_the_order_of_experts(base):
    model, _, _ = load_run(base / "sft", "last")
    routing = model(torch.tensor([[1, 2, 3, 4]])).routing
    read_BS = torch.tensor([[True, True, True, False]])
    other = [layer.expert.flip(-1).clone() for layer in routing]
    assert flips(routing, other, read_BS)["flips"] == 0
    other[0][3] = torch.tensor([0, 0])  # behind the end
    assert flips(routing, other, read_BS)["flips"] == 0
    other[0][1] = torch.tensor([0, 0])
    assert flips(routing, other, read_BS)["flips"] == pytest.approx(1 / 3 / len(routing))
    assert flips(routing, None, read_BS) == {}


def test_a_reward_that_is_the_same_for_all_at_the_first_step_is_refused(base):
    cfg = grpo(base, "constant", **{"objective.reward": "exact"})
    model, companions, prompts = opened(base, cfg)
    never = dataclasses.replace(prompts, answers=["never"] * 4)
    with pytest.raises(BadInput, match=r"objective\.reward=exact gives 0 to each of the 16 answers of the first step"):
        draw_answers(model, never, companions, cfg, 1)
    assert draw_answers(model, never, companions, cfg, 2).figures["flat"] == 1


def test_a_judge_whose_numbers_are_not_finite_is_refused(base):
    cfg = grpo(base, "x")
    model, companions, prompts = opened(base, cfg)
    judge = load_run(base / "sft", "last")[0]
    judge.reward = torch.nn.Linear(judge.cfg.d_model, 1, bias=False)
    judge.reward.weight.data.fill_(math.nan)
    with pytest.raises(BadInput, match="the reward of an answer is nan: accepted is a finite number"):
        draw_answers(model, prompts, Companions(companions.tokenizer, companions.reference, judge), cfg, 1)


def test_a_judge_that_is_no_reward_model_is_refused(base):
    cfg = grpo(base, "unjudged", **{"objective.reward": "model", "objective.judge": str(base / "sft")})
    with pytest.raises(BadInput, match=r"objective\.judge=.*sft has objective\.name=lm: accepted is a run with"):
        train(cfg)
    assert not (base / "unjudged").exists()


def test_a_source_with_another_tokenizer_or_of_another_model_is_refused(base):
    with pytest.raises(BadInput, match=r"source=.* was trained with another tokenizer"):
        train(dpo(base, "other", **{"tokenizer.name": "char"}))
    with pytest.raises(BadInput, match=r"source=.* does not fit this run: the checkpoint does not hold"):
        train(dpo(base, "other", **{"model.d_model": 16}))
    assert not (base / "other").exists()


def test_the_reference_stays_what_it_was_and_a_rollout_needs_no_gradient(base):
    cfg = grpo(base, "x", **{"objective.kl": 0.1})
    model, companions, prompts = opened(base, cfg)
    before = {name: value.clone() for name, value in model_tensors(companions.reference).items()}
    compute_gradients(model, draw_answers(model, prompts, companions, cfg, 1), cfg, companions=companions)
    assert all(torch.equal(before[name], value) for name, value in model_tensors(companions.reference).items())
    assert all(p.grad is None for p in companions.reference.parameters())
    load_model(model, before)
    assert rollout(model, [[1]], 2, seeds=[0], stop=[], pad=0).tokens_BS1.requires_grad is False
