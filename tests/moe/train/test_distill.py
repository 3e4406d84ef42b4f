"""Claims about distillation: the loss, and a run that has another as its teacher."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from moe.data.loader import Batch
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer, next_token_loss
from moe.run.jsonl import read_lines
from moe.train.distill import distill_loss, load_teacher
from moe.train.step import compute_gradients
from tests.small_runs import fate, files, settings, train, train_until


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_distillation_loss_equals_a_loop(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 5)), 3 * rng.normal(size=(2, 3, 5))
    total = 0.0
    for b in range(2):
        for s in range(3):
            p, q = (np.exp(each[b, s] / temperature) for each in (teacher, student))
            p, q = p / p.sum(), q / q.sum()
            total += sum(p[v] * math.log(p[v] / q[v]) for v in range(5))
    expected = temperature**2 * total / 6
    assert distill_loss(torch.tensor(student), torch.tensor(teacher), temperature).item() == pytest.approx(expected)


def test_the_distillation_loss_is_0_at_equality_and_its_gradient_is_the_students_alone():
    student = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = (student.detach() + torch.arange(5)).requires_grad_()
    assert distill_loss(student, student).abs() < 1e-15
    assert distill_loss(student, student + 7.0, 2.0).abs() < 1e-12
    loss = distill_loss(student, teacher, 2.0)
    loss.backward()
    expected = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 6  # T · (q − p) / tokens
    assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-12)
    assert teacher.grad is None
    assert distill_loss(student.detach().bfloat16(), teacher.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_the_distillation_loss_refuses_a_temperature_that_is_not_above_0(temperature):
    with pytest.raises(BadInput, match="temperature="):
        distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """The folder of a finished MoE run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(settings(corpus, folder))
    return folder


DENSE = {"model.moe": None}


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_is_shared_between_the_text_and_the_teacher(parts, corpus, teacher):
    changes = DENSE | {"distill.teacher": str(teacher), "distill.weight": 0.25, "distill.temperature": 2.0}
    cfg = settings(corpus, "", changes | {"model.vocab_size": 257, "dispatch": "torch", "train.accumulate": parts})
    guide = load_teacher(cfg, Tokenizer.load(teacher / "tokenizer").fingerprint, torch.device("cpu")).double()
    assert not guide.training
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(0).double()
    tokens = torch.randint(0, 257, (8, 33), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(8, 32, dtype=torch.uint8))
    logits = model(batch.tokens_BS).logits_BSV
    text = next_token_loss(logits, batch.targets_BS)
    taught = distill_loss(logits, guide(batch.tokens_BS).logits_BSV, 2.0)
    expected = 0.75 * text + 0.25 * taught
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = compute_gradients(model, batch, cfg, 0.0, guide)
    assert (found.lm_loss, found.losses["distill"]) == pytest.approx((text.item(), taught.item()), rel=1e-9)
    assert found.total == pytest.approx(expected.item(), rel=1e-9)
    for (name, p), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert_close(p.grad, gradient, rtol=1e-7, atol=1e-11, msg=name)
    assert all(p.grad is None for p in guide.parameters())


def test_a_run_with_a_teacher_comes_nearer_to_it_and_leaves_it_as_it_is(corpus, teacher, tmp_path):
    before = files(teacher)
    changes = DENSE | {"distill.teacher": str(teacher), "distill.weight": 1.0, "train.steps": 30}
    train(settings(corpus, tmp_path / "run", changes))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert lines[-1]["distill"] < 0.5 * lines[0]["distill"]
    assert all(line["loss"] == pytest.approx(line["distill"]) for line in lines)
    assert files(teacher) == before


def test_a_weight_of_zero_changes_no_bit_of_what_is_learnt(corpus, teacher, tmp_path):
    train(settings(corpus, tmp_path / "alone", DENSE))
    train(settings(corpus, tmp_path / "taught", DENSE | {"distill.teacher": str(teacher), "distill.weight": 0.0}))
    alone, taught = (read_lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("alone", "taught"))
    assert taught["val"] == alone["val"]
    assert "distill" in taught
    assert "distill" not in alone


def test_a_killed_run_with_a_teacher_goes_on_as_if_nothing_had_been(corpus, teacher, tmp_path):
    changes = DENSE | {"distill.teacher": str(teacher)}
    train(settings(corpus, tmp_path / "whole", changes))
    cfg = settings(corpus, tmp_path / "killed", changes | {"resume": True})
    train_until(cfg, 5)
    train(cfg)
    assert fate(tmp_path / "killed") == fate(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill.teacher": "nowhere"}, "distill.teacher=nowhere is not a run's folder"),
        ({"distill.which": "step-1"}, "which=step-1 is not one of best, last"),
        ({"model.context": 64}, "has model.context=32, and this run 64"),
        ({"tokenizer.name": "char"}, "has another tokenizer"),
        ({"model.vocab_size": 300}, "has model.vocab_size=257, and this run 300"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_run_is_there(changes, words, corpus, teacher, tmp_path):
    with pytest.raises(BadInput) as refusal:
        train(settings(corpus, tmp_path / "run", {"distill.teacher": str(teacher)} | changes))
    assert words in str(refusal.value)
    assert not (tmp_path / "run").exists()
