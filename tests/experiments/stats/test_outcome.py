"""Claims about what a study found, of runs with known losses."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.stats import outcome as of
from experiments.stats.outcome import outcome, sentences
from experiments.study.manifest import config_of, run_of
from experiments.study.states import states_of
from moe.run.summary import read_summary, write_summary
from tests.experiments.study import small_studies

SEEDS = (0, 1, 2)
DIFFERENCES = {"sigmoid": (-0.30, -0.31, -0.29), "switch": (0.2, -0.25, 0.05)}


@pytest.fixture(scope="module")
def done(tmp_path_factory, corpus):
    """A study of three arms over three seeds, trained, with losses that the tests know."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    job = functools.partial(small_studies.job, corpus, train__eval_every=2)
    jobs = [job("softmax", seed) for seed in SEEDS]
    jobs += [job("sigmoid", seed) for seed in SEEDS]
    jobs += [dataclasses.replace(job("softmax", seed, optim__lr=1e-3), arm="switch") for seed in SEEDS]
    study = small_studies.write(folder, jobs, margin=0.05)
    small_studies.work(folder)
    for job in jobs:
        run = run_of(folder, job)
        loss = 3.0 + 0.1 * job.seed + (DIFFERENCES[job.arm][job.seed] if job.arm in DIFFERENCES else 0.0)
        summary = read_summary(run)
        write_summary(run, dataclasses.replace(summary, val=dataclasses.replace(summary.val, loss=loss, bpb=loss / 2)))
    return folder, study


def _outcome(done):
    folder, study = done
    return outcome(folder, study, states_of(folder, study))


def test_arms_are_judged_against_the_base_seed_by_seed_and_corrected_for_their_number(done):
    result = _outcome(done)
    assert [arm.name for arm in result.arms] == ["softmax", "sigmoid", "switch"]
    by_name = {arm.name: arm for arm in result.arms}
    assert by_name["softmax"].judgement is None
    assert [by_name[name].judgement.word for name in DIFFERENCES] == ["better", "inconclusive"]
    level = 1 - 0.95**0.5  # each of two, so that both hold in 95%
    for name, differences in DIFFERENCES.items():
        low, high = stats.t.interval(1 - level, 2, np.mean(differences), stats.sem(differences))
        judged = by_name[name].judgement
        assert (judged.low, judged.high) == (pytest.approx(low), pytest.approx(high))
        assert by_name[name].bits.mean == pytest.approx(np.mean(differences) / 2)
    assert by_name["sigmoid"].ranks[0] == 1


def test_the_first_sentence_says_what_came_out_and_the_others_how_far(done):
    said = sentences(_outcome(done))
    assert said[0] == "Against softmax, sigmoid is better; switch is inconclusive."
    assert "sigmoid is better than softmax (−0.300 nats, 95% interval " in said[1]
    needed = _outcome(done).arms[2].judgement.seeds_needed
    assert "switch against softmax is inconclusive (+0.000 nats, 95% interval " in said[1]
    assert f"over 3 seeds; {f'about {needed}' if needed else 'more than 1,000'} seeds would decide)." in said[1]
    assert said[2].startswith("Words are corrected for 2 comparisons")
    assert said[3].startswith("The margin of 0.05 nats per token was declared before training")


def test_of_many_arms_those_without_a_difference_are_counted_and_the_others_told(done):
    result = _outcome(done)
    base, better, open_ = result.arms
    many = [base, *(dataclasses.replace(open_, name=f"open{i}") for i in range(9)), better]
    said = sentences(dataclasses.replace(result, arms=many))
    assert said[0] == "Against softmax, sigmoid is better; 9 of 10 arms are inconclusive."
    assert said[1] == of.arm_sentence("sigmoid", better.judgement, "softmax")
    assert not any("open3" in sentence for sentence in said)


def test_of_a_search_the_lowest_mean_is_named_with_its_settings(done):
    folder, study = done
    asked = dataclasses.replace(study, base="")
    result = outcome(folder, asked, states_of(folder, asked))
    lowest = np.mean([3.0 + 0.1 * seed + DIFFERENCES["sigmoid"][seed] for seed in SEEDS])
    said = (
        f"Of 3 finished trials sigmoid has the lowest validation loss, {lowest:.3f} nats per token (router=sigmoid): "
    )
    assert sentences(result) == [said + "the lowest of many is so by chance too, and other seeds would decide."]
    assert result.reference == "softmax"
    assert all(arm.judgement is None for arm in result.arms)


def test_what_differs_is_what_may_change_a_result(done):
    settings = {arm.name: arm.settings for arm in _outcome(done).arms}
    assert settings["softmax"] == []
    assert settings["sigmoid"] == [("router.name", "softmax", "sigmoid")]
    assert [key for key, *_ in settings["switch"]] == ["optim.lr"]


def test_a_dense_models_experts_are_one_difference(corpus):
    moe, dense = (config_of(job) for job in _pair(corpus))
    assert ("model.moe", "experts", "null") in of.what_differs(moe, dense)
    assert sum(key.startswith("model.moe") for key, *_ in of.what_differs(moe, dense)) == 1


def _pair(corpus):
    return small_studies.job(corpus), small_studies.job(corpus, model__moe=None)


def test_what_is_not_finished_is_named_and_the_rest_judged(done, corpus):
    folder, study = done
    more = [*study.jobs, *(small_studies.job(corpus, "softmax", seed) for seed in (7,))]
    bigger = dataclasses.replace(study, jobs=more)
    result = outcome(folder, bigger, states_of(folder, bigger))
    assert result.missing == ["softmax seed 7 is waiting"]
    assert sentences(result)[-1] == "1 of 10 runs are not in it: softmax seed 7 is waiting."
    assert sentences(result)[0] == sentences(_outcome(done))[0]


def test_a_base_without_a_finished_run_has_no_verdict(done):
    folder, study = done
    other = dataclasses.replace(study, jobs=[job for job in study.jobs if job.arm != "softmax"], base="softmax")
    base = small_studies.job(Path("/nowhere"), "softmax", 9)
    other = dataclasses.replace(other, jobs=[base, *other.jobs])
    result = outcome(folder, other, states_of(folder, other))
    assert sentences(result)[0] == "No run of the base, softmax, is finished: there is no verdict yet."


def test_one_seed_gives_no_verdict(done):
    folder, study = done
    single = dataclasses.replace(study, jobs=[job for job in study.jobs if job.seed == 0 and job.arm != "switch"])
    result = outcome(folder, single, states_of(folder, single))
    assert sentences(result)[0] == "sigmoid differs from softmax by −0.300 nats in one seed, which gives no verdict."


def test_an_arm_is_judged_beside_its_dense_twin_too(done):
    folder, study = done
    twins = dataclasses.replace(study, twins={"sigmoid": "switch", "softmax": "switch"})
    result = outcome(folder, twins, states_of(folder, twins))
    differences = np.subtract(DIFFERENCES["sigmoid"], DIFFERENCES["switch"])
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    beside = {arm.name: arm.beside_twin for arm in result.arms}
    assert (beside["sigmoid"].low, beside["sigmoid"].high) == (pytest.approx(low), pytest.approx(high))
    assert (beside["softmax"], beside["switch"]) == (None, None)  # the base's twin is judged against it already
    assert sentences(result)[3].startswith("sigmoid against its dense twin is inconclusive (−0.300 nats, ")


def test_many_missing_runs_are_counted_and_the_first_are_named(done, corpus):
    folder, study = done
    more = dataclasses.replace(
        study, jobs=[*study.jobs, *(small_studies.job(corpus, "softmax", 20 + i) for i in range(8))]
    )
    result = outcome(folder, more, states_of(folder, more))
    assert len(result.missing) == 8
    said = sentences(result)[-1]
    assert said.startswith("8 of 17 runs are not in it: softmax seed 20 is waiting; ")
    assert said.endswith("softmax seed 25 is waiting; and 2 more.")


def test_a_run_whose_loss_is_not_finite_is_named_and_left_out(done):
    folder, study = done
    run = run_of(folder, study.jobs[4])
    kept = read_summary(run)
    write_summary(run, dataclasses.replace(kept, val=dataclasses.replace(kept.val, loss=math.nan)))
    try:
        result = _outcome(done)
    finally:
        write_summary(run, kept)
    assert result.missing == ["sigmoid seed 1 is left out: its validation loss is not finite"]
    assert {arm.name: arm.seeds for arm in result.arms}["sigmoid"] == [0, 2]


@pytest.mark.parametrize("place", [0, 4])
def test_runs_of_another_text_or_tokenizer_than_the_bases_are_named_and_left_out(done, place):
    folder, study = done
    job = study.jobs[place]
    run = run_of(folder, job)
    kept = read_summary(run)
    write_summary(run, dataclasses.replace(kept, tokenizer="another"))
    try:
        result = _outcome(done)
    finally:
        write_summary(run, kept)
    assert {arm.name: len(arm.runs) for arm in result.arms} == {name: 3 - (name == job.arm) for name in study.arms}
    (reason,) = result.missing
    assert reason.startswith(f"{job.title} is left out: ")
    assert "do not have the same tokenizer" in reason
