"""Claims about what a run's model is asked."""

import numpy as np
import pytest
import torch

from moe.analysis import decisions
from moe.analysis.effects import Variant, effects, measure
from moe.analysis.interventions import Change
from moe.analysis.probing import SHARES, decided, probe
from moe.analysis.trace import Recorder
from moe.analysis.tracing import What, windows_of_run
from moe.errors import BadInput
from moe.run.load import load_run
from tests.small_runs import settings, train

WHAT = What(tokens=256)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, str(folder), {"checkpoint.keep": 9}))
    return folder


def test_every_expert_is_masked_and_every_answer_is_of_the_same_text(run):
    probed = probe(run, "last", WHAT)
    assert set(probed.importance) == {(layer, expert) for layer in (0, 1) for expert in range(4)}
    model, tokenizer, cfg = load_run(run, "last")
    windows = windows_of_run(WHAT, cfg, tokenizer)
    variant = Variant("alone", [Change("mask", 1, [2])])
    (alone,) = effects(measure(model, list(windows), windows.domains, [variant]), [variant])
    assert probed.importance[1, 2].total.difference == pytest.approx(alone.total.difference, abs=1e-6)
    assert probed.sampling == windows.sampling
    assert list(probed.kept) == list(SHARES)
    assert [one.layer for one in probed.alike] == [0, 1]
    assert [one.layer for one in probed.lookahead] == [1]


def test_how_decided_routers_are_is_what_one_pass_over_all_tokens_says(run):
    model, tokenizer, cfg = load_run(run, "last")
    batches = list(windows_of_run(WHAT, cfg, tokenizer))
    with Recorder(model, 2) as recorder, torch.no_grad():
        model(torch.from_numpy(np.concatenate([batch[0] for batch in batches])[:, :-1]))
        expected = [routing.prob_TE() for routing in recorder.decided]
    for one, prob_TE in zip(decided(model, batches), expected, strict=True):
        assert one.information == pytest.approx(decisions.router_information(prob_TE), rel=1e-4)
        assert one.top_k_mass == pytest.approx(decisions.top_k_mass(prob_TE, 2), rel=1e-5)


def test_only_checkpoints_up_to_the_one_in_question_are_compared(run):
    steps = lambda which: [one.step for one in probe(run, which, WHAT).over_time.checkpoints]
    assert steps("last") == [3, 6, 7]
    assert steps("step-6") == [3, 6]
    assert probe(run, "step-3", WHAT).over_time is None


def test_a_router_without_a_fixed_number_of_experts_is_not_asked_to_keep_few(corpus, tmp_path):
    changes = {"router.name": "threshold", "balance.aux": 0.0, "balance.z": 0.0, "train.steps": 2, "optim.warmup": 0}
    train(settings(corpus, str(tmp_path / "run"), changes))
    probed = probe(tmp_path / "run", "last", WHAT)
    assert probed.kept == {}
    assert torch.tensor([effect.total.before for effect in probed.importance.values()]).isfinite().all()


@pytest.mark.parametrize(("k", "masked", "kept"), [(4, 0, []), (2, 8, []), (1, 8, list(SHARES))])
def test_what_a_router_cannot_do_without_is_not_masked(corpus, tmp_path, k, masked, kept):
    changes = {"router.gradient": "sparsemixer", "router.renormalize": False, "model.moe.k": k}
    changes |= {"train.steps": 1, "optim.warmup": 0}
    train(settings(corpus, str(tmp_path / "run"), changes))
    probed = probe(tmp_path / "run", "last", WHAT)
    assert (len(probed.importance), list(probed.kept)) == (masked, kept)


def test_a_dense_run_is_refused(corpus, tmp_path):
    train(settings(corpus, str(tmp_path / "dense"), {"model.moe": None, "train.steps": 1, "optim.warmup": 0}))
    with pytest.raises(BadInput, match="dense"):
        probe(tmp_path / "dense", "last", WHAT)
