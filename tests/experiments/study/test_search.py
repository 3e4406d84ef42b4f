"""Claims about a search: what was asked and told stands in the plan and the runs alone, whatever was killed."""

import dataclasses
import math
import sys

import numpy as np
import optuna
import pytest

from experiments.study import pool, search, worker
from experiments.study.claims import record_failure
from experiments.study.manifest import Job, Search, Study, Trial, config_of, read_study, run_of, write_study
from experiments.study.pool import Pool
from experiments.study.search import arm_of, ask, best, is_wanting, outcome_of, refusals
from experiments.study.states import states_of
from moe.errors import BadInput
from moe.run.summary import read_summary
from tests.experiments.study import forked
from tests.experiments.study.small_studies import fates, job, study_of, work
from tests.small_runs import Killed

SPACE = {"optim.lr": "log 1e-4 1e-1", "model.moe.k": "choice 2,3,4"}


def planned(folder, corpus, n_trials=3, seeds=(0,), space=SPACE, **about):
    """A search of small runs, in `folder`."""
    settings = [job(corpus, seed=seed, train__steps=2).config for seed in seeds]
    study = dataclasses.replace(
        study_of([job(corpus)], base="", **about), jobs=[], search=Search(dict(space), n_trials, 0, settings)
    )
    write_study(folder, study)
    return study


@pytest.fixture
def by_formula(monkeypatch):
    """Trials that nobody trains: done as soon as asked for, with the loss (ln lr − ln 0.01)² + (k − 3)²."""

    def finished(run, cfg):
        loss = (math.log(cfg.optim.lr) - math.log(0.01)) ** 2 + (cfg.model.moe.k - 3) ** 2 + 0.01 * cfg.seed
        score = type("Score", (), {"loss": loss})
        return type("Summary", (), {"val": score})

    monkeypatch.setattr(search, "finished", finished)


def asked_all(folder, study):
    """The study when all trials have been asked for."""
    while is_wanting(study):
        study = ask(folder, study)
    return study


def test_a_worker_asks_for_every_trial_trains_it_and_finds_nothing_more_to_do(tmp_path, corpus):
    folder = tmp_path / "study"
    planned(folder, corpus, 3, seeds=(0, 1))
    events = work(folder)
    study = read_study(folder)
    assert [(each.arm, each.seed) for each in study.jobs] == [(f"trial-{n}", seed) for n in range(3) for seed in (0, 1)]
    assert [event.job for event in events if event.what == "done"] == [each.id for each in study.jobs]
    for number, trial in enumerate(study.search.asked):
        runs = [each for each in study.jobs if each.arm == arm_of(number)]
        for each in runs:
            cfg = config_of(each)
            assert {"optim.lr": cfg.optim.lr, "model.moe.k": cfg.model.moe.k} == trial.values
            assert 1e-4 <= cfg.optim.lr <= 1e-1
        losses = [read_summary(run_of(folder, each)).val.loss for each in runs]
        assert outcome_of(folder, study, number).loss == np.mean(losses)
    before = fates(folder, study)
    assert work(folder) == []
    assert (read_study(folder), fates(folder, study)) == (study, before)


@pytest.mark.parametrize("moment", range(4))
def test_a_search_that_was_killed_has_the_trials_of_one_that_was_not(moment, tmp_path, corpus, monkeypatch):
    """Killed before and after the second trial is written down, and before and after its training."""
    planned(tmp_path / "whole" / "study", corpus)
    work(tmp_path / "whole" / "study")
    folder = tmp_path / "killed" / "study"
    planned(folder, corpus)
    place, name, after = [
        (search, "write_study", False), (search, "write_study", True),
        (worker, "train", False), (worker, "train", True),
    ][moment]  # fmt: skip
    call, calls = getattr(place, name), []

    def killed(*given, **named):
        calls.append(given)
        result = None if len(calls) == 2 and not after else call(*given, **named)
        if len(calls) == 2:
            raise Killed
        return result

    monkeypatch.setattr(place, name, killed)
    with pytest.raises(Killed):
        work(folder)
    monkeypatch.setattr(place, name, call)
    known = read_study(folder).search.asked
    work(folder)
    study = read_study(folder)
    assert study.search.asked[: len(known)] == known
    assert study == read_study(tmp_path / "whole" / "study")
    assert fates(folder, study) == fates(tmp_path / "whole" / "study", study)


def test_workers_beside_each_other_ask_for_no_trial_twice(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(pool, "subprocess", forked)
    folder = tmp_path / "study"
    study = planned(folder, corpus, 6)
    said = []
    assert Pool(folder, study, 2, said.append).run() == 0
    study = read_study(folder)
    assert [each.arm for each in study.jobs] == [arm_of(n) for n in range(6)]
    assert len({each.id for each in study.jobs}) == 6
    assert [state.word for state in states_of(folder, study)] == ["done"] * 6
    assert sum("val loss" in line and line.startswith("trial-") for line in said) == 6
    assert said[-2:] == [best(folder, study), f"study: {folder} is finished: all 6 jobs are done"]


def test_who_asks_with_an_older_plan_gets_what_others_asked_for(tmp_path, corpus, by_formula):
    study = planned(tmp_path / "study", corpus)
    first = ask(tmp_path / "study", study)
    assert ask(tmp_path / "study", study) == first == read_study(tmp_path / "study")
    assert len(first.search.asked) == 1


def test_what_is_asked_is_optunas_own_sampler_told_of_every_trial_before(tmp_path, corpus, by_formula):
    study = asked_all(tmp_path / "study", planned(tmp_path / "study", corpus, 14))
    distributions = {
        "optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "model.moe.k": optuna.distributions.CategoricalDistribution([2, 3, 4]),
    }
    seed = int(np.random.SeedSequence([0, 13, 0]).generate_state(1)[0])
    session = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for trial in study.search.asked[:13]:
        loss = (math.log(trial.values["optim.lr"]) - math.log(0.01)) ** 2 + (trial.values["model.moe.k"] - 3) ** 2
        session.add_trial(optuna.trial.create_trial(value=loss, params=trial.values, distributions=distributions))
    assert session.ask(distributions).params == study.search.asked[13].values


def test_a_search_finds_the_best_better_than_chance(tmp_path, corpus, by_formula):
    """Of 40 trials the later half, which knows the first, is nearer to the optimum at lr 0.01 and k 3."""
    study = asked_all(tmp_path / "study", planned(tmp_path / "study", corpus, 40))
    losses = [outcome_of(tmp_path / "study", study, number).loss for number in range(40)]
    assert np.median(losses[20:]) < 0.5 * np.median(losses[:10])
    number = int(np.argmin(losses))
    assert f"the best so far is trial-{number}, val loss {losses[number]:.4f}: " in best(tmp_path / "study", study)


def test_a_search_with_more_trials_begins_with_those_of_the_shorter_one(tmp_path, corpus, by_formula):
    few = asked_all(tmp_path / "few", planned(tmp_path / "few", corpus, 3))
    more = asked_all(tmp_path / "more", planned(tmp_path / "more", corpus, 5))
    assert more.search.asked[:3] == few.search.asked
    other = planned(tmp_path / "other", corpus, 3)
    other = dataclasses.replace(other, search=dataclasses.replace(other.search, sampler_seed=1))
    write_study(tmp_path / "other", other)
    assert asked_all(tmp_path / "other", other).search.asked[0] != few.search.asked[0]


def test_every_point_of_a_small_space_is_tried_once(tmp_path, corpus, by_formula):
    space = {"model.moe.k": "choice 2,3,4", "model.n_layers": "int 2 3"}
    study = asked_all(tmp_path / "study", planned(tmp_path / "study", corpus, 6, space=space))
    points = {tuple(trial.values.values()) for trial in study.search.asked}
    assert points == {(k, n) for k in (2, 3, 4) for n in (2, 3)}


def test_a_trial_that_fails_is_told_as_failed_and_the_search_goes_on(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "study"
    planned(folder, corpus, 3, retries=0)
    train = worker.train

    def broken(cfg, say):
        if read_study(folder).jobs[0].config["optim"]["lr"] == cfg.optim.lr:
            raise ZeroDivisionError("division by zero")
        return train(cfg, say)

    monkeypatch.setattr(worker, "train", broken)
    told = []
    create = optuna.trial.create_trial
    monkeypatch.setattr(optuna.trial, "create_trial", lambda **given: told.append(given["state"]) or create(**given))
    work(folder)
    study = read_study(folder)
    assert [outcome_of(folder, study, number).word for number in range(3)] == ["failed", "done", "done"]
    states = optuna.trial.TrialState
    assert told == [states.FAIL, states.FAIL, states.COMPLETE]  # as the second was asked for, and as the third was
    assert best(folder, study).startswith("search: 2 of 3 trials done, 1 failed; the best so far is trial-")


def test_settings_that_cannot_be_are_a_failed_trial_without_a_run(tmp_path, corpus):
    folder = tmp_path / "study"
    planned(folder, corpus, 2, space={"model.moe.k": "choice 2,7"})  # of four experts
    work(folder)
    study = read_study(folder)
    assert sorted(trial.values["model.moe.k"] for trial in study.search.asked) == [2, 7]
    impossible = next(number for number, trial in enumerate(study.search.asked) if trial.values["model.moe.k"] == 7)
    (refusal,) = refusals(study)
    assert refusal.startswith(f"trial-{impossible}: model.moe.k=7 exceeds model.moe.n_experts=4: ")
    assert outcome_of(folder, study, impossible).word == "failed"
    assert [each.arm for each in study.jobs] == [arm_of(1 - impossible)]


def test_a_search_of_which_no_trial_can_be_trained_ends_with_status_2(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setattr(pool, "subprocess", forked)
    study = planned(tmp_path / "study", corpus, 2, space={"model.moe.k": "choice 7,8"})
    said = []
    assert Pool(tmp_path / "study", study, 1, said.append).run() == 2
    assert capsys.readouterr().err == "error: no trial of the search could be trained: each was refused above\n"
    assert sum("exceeds model.moe.n_experts=4" in line for line in said) == 2


def test_a_trial_is_open_until_its_last_seed_and_no_loss_is_none(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "study"
    study = ask(folder, planned(folder, corpus, 1, seeds=(0, 1), retries=0))
    losses = {}
    summary = lambda loss: type("Summary", (), {"val": type("Score", (), {"loss": loss})})
    monkeypatch.setattr(search, "finished", lambda run, cfg: summary(losses[cfg.seed]) if cfg.seed in losses else None)
    assert outcome_of(folder, study, 0).word == "open"
    losses[0] = 2.0
    assert outcome_of(folder, study, 0).word == "open"
    losses[1] = 4.0
    assert outcome_of(folder, study, 0) == search.Outcome("done", 3.0)
    assert "val loss 3.0000 on average over 2 seeds: optim.lr=" in best(folder, study)
    losses[1] = math.nan
    assert outcome_of(folder, study, 0).word == "failed"
    del losses[1]
    record_failure(tmp_path, study.jobs[1].id, BadInput("too little memory."))
    assert outcome_of(folder, study, 0).word == "failed"
    assert best(folder, study) == "search: 0 of 1 trials done, 1 failed"


def test_the_plan_of_a_search_comes_back_as_it_was_written(tmp_path, corpus):
    study = planned(tmp_path, corpus)
    trial = Trial({"optim.lr": 0.1 + 0.2, "model.moe.k": 3}, "no.")
    grown = dataclasses.replace(study, search=dataclasses.replace(study.search, asked=[trial]))
    write_study(tmp_path, grown)
    assert read_study(tmp_path) == grown
    assert isinstance(grown, Study)
    assert all(isinstance(each, Job) for each in grown.jobs)


def test_without_optuna_a_sentence_says_what_to_install(tmp_path, corpus, monkeypatch):
    study = planned(tmp_path / "study", corpus)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        BadInput, match=r"^study\.search needs the package optuna, .*: pip install 'moe-switchyard\[opt"
    ):
        ask(tmp_path / "study", study)
    assert read_study(tmp_path / "study") == study
