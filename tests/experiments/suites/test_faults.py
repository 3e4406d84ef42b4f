"""Claims about injected faults: that each does what it says, and how alarms are counted."""

import numpy as np
import pytest
import torch

from experiments.suites import faults
from moe.data.prepare import prepare
from moe.model.transformer import Transformer
from tests.small_runs import settings, silent


@pytest.fixture
def small(corpus, monkeypatch):
    """Runs of six steps on the tests' text, broken at the third; its late domain is botany."""
    for name, value in {"STEPS": 6, "BREAKS": 3, "SMOOTH": 2, "LATE": "botany"}.items():
        monkeypatch.setattr(faults, name, value)
    base = faults.BASE | {"optim": {"lr": 0.01, "warmup": 1}}
    monkeypatch.setattr(faults, "BASE", base)
    cfg = settings(corpus, "")
    return prepare(cfg.data, cfg.tokenizer, silent)


def _model(router="softmax"):
    cfg = faults.config(router, 0, 6)
    cfg.model.vocab_size = 257
    return Transformer(cfg.model, cfg.router, cfg.balance).initialize(0)


def test_a_poisoned_expert_is_300_times_as_loud_from_its_step_on():
    model = _model()
    down_EDF = model.blocks[-1].mlp.experts.w_down_EDF
    before = down_EDF.detach().clone()
    faults.poison(model, faults.BREAKS - 1)
    assert torch.equal(down_EDF, before)
    faults.poison(model, faults.BREAKS)
    torch.testing.assert_close(down_EDF[0], 300 * before[0])
    assert torch.equal(down_EDF[1:], before[1:])


def test_a_fast_router_goes_30_times_as_far_and_a_rounded_one_is_bf16():
    model = _model()
    before = [faults.weights(router).data.clone() for router in model.routers()]
    for router in model.routers():
        faults.weights(router).data += 0.01
    faults.faster(model, 1, before)
    for router, weight in zip(model.routers(), before, strict=True):
        torch.testing.assert_close(
            faults.weights(router).data - weight, torch.full_like(weight, 0.3), rtol=1e-4, atol=0
        )
    faults.rounded(model, 1, before)
    for router in model.routers():
        data = faults.weights(router).data
        assert torch.equal(data, data.bfloat16().float())


def test_a_late_domain_has_no_text_before_its_step_and_some_after(small):
    cfg, number = faults.config("softmax", 0, 6), small.domains.index("botany")
    late, always = ([batch.domain_BS for batch in faults.batches(cfg, small, late)] for late in (True, False))
    assert len(late) == len(always) == 6
    assert not any((domain_BS == number).any() for domain_BS in late[:2])
    assert any((domain_BS == number).any() for domain_BS in late[2:])
    assert any((domain_BS == number).any() for domain_BS in always[:2])


def test_settings_that_no_run_may_have_reach_the_step(small):
    right, wrong = faults.config("softmax", 0, 6), faults.config("softmax", 0, 6)
    faults.FAULTS[1].break_settings(wrong)
    assert wrong.balance.aux == -0.01
    for cfg, sign in ((right, 1), (wrong, -1)):
        line = faults.train(cfg, small)[0]
        assert line.loss - line.lm_loss - 0.001 * line.losses["z"] == pytest.approx(
            sign * 0.01 * line.losses["aux"], rel=1e-6
        )


def test_where_a_loss_shows_a_fault_is_the_first_step_of_a_stretch(monkeypatch):
    monkeypatch.setattr(faults, "SMOOTH", 3)
    twin = np.zeros(20)
    shown = np.where(np.arange(20) >= 10, 0.5, 0.0)
    shown[4] = 0.9  # one bad step is none
    # The median of three steps is above from the second bad one on, which is step 12.
    assert faults.shows_at(shown, twin, 0.1) == 12
    assert faults.shows_at(shown, twin, 0.6) is None
    assert faults.shows_at(twin, twin, 0.1) is None


def test_every_router_and_every_fault_has_a_row_per_seed(small):
    said = []
    rows = faults.measure([1, 2], said.append, 6, small)
    assert len(rows) == len(said) == 2 * (len(faults.ROUTERS) + len(faults.FAULTS))
    assert {row.fault for row in rows} == {"", *(fault.name for fault in faults.FAULTS)}
    assert all(not row.alarms for row in rows), "six steps are too few to say anything"
