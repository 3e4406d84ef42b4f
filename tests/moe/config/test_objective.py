"""Objectives: what each needs, and what has no place beside it."""

import pytest

from moe.config.run import build, fingerprint
from tests.moe.config.refusals import refusal, tree

PAIRS = {"objective.name": "dpo", "source": "runs/SFT", "data.name": "preferences", "data.path": "pairs.jsonl"}
DRAWN = {"objective.name": "grpo", "source": "runs/SFT", "data.name": "prompts", "data.path": "prompts.jsonl"}

IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "text for pairs": (PAIRS | {"data.name": "text"}, "learns from data=preferences, and data.name is text"),
    "no data": ({"objective.name": "grpo"}, "learns from data=prompts, and data.name is blend"),
    "no source": (PAIRS | {"source": ""}, "objective.name=dpo needs source=RUN"),
    "a judge that nobody asks": (DRAWN | {"objective.judge": "runs/R"}, "=runs/R with objective.reward=exact"),
    "no judge": (DRAWN | {"objective.reward": "model"}, "objective.judge= with objective.reward=model"),
    "a bias that moves": (
        DRAWN | {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.01},
        "balance.bias_rate=0.01 has no place in objective.name=grpo: set balance.bias_rate=0",
    ),
    "capacity": (DRAWN | {"balance.capacity": 1.25}, "balance.capacity=1.25 has no place in objective.name=grpo"),
    "the whole step": (PAIRS | {"balance.scope": "global"}, "balance.scope=global has no meaning"),
    "a pair cut apart": (
        PAIRS | {"train.batch_size": 6, "train.accumulate": 2},
        "train.batch_size=6 in train.accumulate=2 parts cuts a pair of answers apart",
    ),
    "a group cut apart": (DRAWN | {"train.batch_size": 12}, "=12 answers are no whole number of groups"),
    "no room": (DRAWN | {"model.context": 16}, "objective.max_new=16 leaves no room for a prompt in model.context=16"),
    "one answer": (DRAWN | {"objective.group": 1}, "objective.group=1 is out of range"),
    "ragged replay": (
        DRAWN | {"objective.replay": True, "router.name": "expert-choice", "balance.aux": 0.0, "balance.z": 0.0},
        "objective.replay=true needs a router with as many choices for every token, and router.name=expert-choice",
    ),
    "a teacher": (PAIRS | {"distill.teacher": "runs/T"}, "distill.teacher=runs/T has no meaning"),
    "a record": (DRAWN | {"log.experts": True}, "log.experts=true has no meaning for objective.name=grpo"),
    "no such reward": (DRAWN | {"objective.reward": "exat"}, "=exat is not one of exact, contains, model"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)


@pytest.mark.parametrize("settings", [PAIRS, DRAWN, PAIRS | {"objective.name": "reward"}])
def test_what_each_learns_from_is_enough(settings):
    assert build(tree(settings)).objective.name == settings["objective.name"]


def test_an_objective_that_is_the_texts_leaves_the_names_of_runs_alone():
    assert fingerprint(build({"objective": {"name": "lm"}})) == fingerprint(build({}))
    assert fingerprint(build(tree(PAIRS))) != fingerprint(build(tree(PAIRS | {"objective.beta": 0.2})))
