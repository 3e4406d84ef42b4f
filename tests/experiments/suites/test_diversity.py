"""Claims about the suite that fine-tunes on more and more kinds of task: what each run learns, and its table."""

import json

import pytest

from experiments.pages.diversity_table import KINDS
from experiments.suites import diversity
from experiments.suites.diversity import LEARNT, OTHERS, measure
from moe.config.parse import to_dict
from tests.small_runs import settings, train


@pytest.fixture
def trained(monkeypatch):
    """The settings of every run that would be trained; none is, and each has a loss of its own."""
    configs = []
    monkeypatch.setattr(diversity, "train", lambda cfg, say: configs.append(cfg))
    monkeypatch.setattr(diversity, "scored", lambda run, folder, say: (float(len(configs)), 1.0))
    monkeypatch.setattr(diversity, "N", 80)
    monkeypatch.setattr(diversity, "ASKED", 5)
    return configs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_differ_in_their_questions_alone_and_have_as_many(trained, tmp_path):
    rows = measure(tmp_path, [0, 1], 7, 9, lambda line: None)
    base, *tuned = trained
    assert len(tuned) == 2 * len(KINDS)
    assert base.train.steps == 9
    assert [row.kinds for row in rows] == [0, 0, *KINDS, *KINDS]
    for cfg, row in zip(tuned, rows[2:], strict=True):
        learnt = rows_of(tmp_path / f"kinds{row.kinds}-seed{row.seed}.jsonl")
        assert len(learnt) == 80
        tasks = {question["task"] for question in learnt}
        assert tasks == set(row.tasks)
        assert len(tasks) == row.kinds
        assert tasks <= set(LEARNT)
        tree = to_dict(cfg)
        assert (tree.pop("run"), tree.pop("seed")) == (str(tmp_path / f"kinds{row.kinds}-seed{row.seed}"), row.seed)
        assert tree["data"].pop("path").endswith(f"kinds{row.kinds}-seed{row.seed}.jsonl")
        assert tree == {key: value for key, value in to_dict(tuned[0]).items() if key not in ("run", "seed")} | {
            "data": {key: value for key, value in to_dict(tuned[0])["data"].items() if key != "path"}
        }
    # Fewer kinds are among more, of one seed.
    by_kinds = {row.kinds: set(row.tasks) for row in rows if row.seed == 0}
    assert by_kinds[1] < by_kinds[2] < by_kinds[4] < by_kinds[8] == set(LEARNT)


def test_what_is_scored_was_not_learnt(trained, tmp_path):
    measure(tmp_path, [0], 1, 1, lambda line: None)
    others, eight = (rows_of(tmp_path / f"{name}.jsonl") for name in ("others", "eight"))
    assert {question["task"] for question in others} == set(OTHERS)
    assert not set(OTHERS) & set(LEARNT)
    learnt = rows_of(tmp_path / "kinds8-seed0.jsonl")
    assert not {question["prompt"] for question in eight} & {question["prompt"] for question in learnt}


def test_a_runs_scores_are_those_of_its_questions(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(diversity, "ASKED", 60)
    for name, tasks in (("others", ["upper"]), ("eight", ["add"])):
        questions = [q for task in tasks for q in diversity.questions(task, 60, 0, True, tmp_path)]
        diversity.write_once(tmp_path / f"{name}.jsonl", questions)
    monkeypatch.setenv("SWITCHYARD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    train(settings(corpus, str(folder), {"model.context": 96, "train.steps": 2}))
    others, eight = diversity.scored(tmp_path, folder, lambda line: None)
    assert 4 < others < 7
    assert 4 < eight < 7
    assert others != eight
