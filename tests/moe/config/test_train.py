"""Training: schedules, batches and devices that cannot be."""

import math

import pytest

from moe.config.train import OptimConfig, warmup_steps
from tests.moe.config.refusals import refusal

IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "one beta": ({"optim.betas": [0.9]}, "optim.betas=[0.9] must be two numbers in [0, 1)"),
    "beta 1": ({"optim.betas": [0.9, 1.0]}, "optim.betas=[0.9, 1.0] must be two numbers"),
    "beta nan": ({"optim.betas": [math.nan, 0.9]}, "optim.betas=[nan, 0.9] must be two numbers"),
    "momentum 1": ({"optim.name": "muon", "optim.momentum": 1.0}, "optim.momentum=1.0 would never take a gradient in"),
    "Muon's rate": ({"optim.muon_lr": 0.02}, "optim.muon_lr=0.02 is a setting of Muon: add optim.name=muon"),
    "Muon's steps": ({"optim.ns_steps": 3}, "optim.ns_steps=3 is a setting of Muon: add optim.name=muon"),
    "Muon's rule": ({"optim.adjust": "original"}, "optim.adjust=original is a setting of Muon: add optim.name=muon"),
    "another optimiser": ({"optim.name": "sgd"}, "optim.name=sgd is not one of adamw, muon"),
    "a misspelt rule": (
        {"optim.adjust": "match_rms"},
        "optim.adjust=match_rms is not one of original, match_rms_adamw",
    ),
    "no steps": (
        {"optim.name": "muon", "optim.ns_steps": 0},
        "optim.ns_steps=0 is out of range: accepted is between 1",
    ),
    "more than all": ({"optim.average": 1.5}, "optim.average=1.5 is out of range: accepted is between 0 and 1"),
    "warm-up": ({"optim.warmup": 601}, "optim.warmup=601 is longer than train.steps=600"),
    "accumulate": ({"train.accumulate": 3}, "train.accumulate=3 must divide train.batch_size=8"),
    "device": ({"train.device": "gpu"}, "train.device=gpu is not one of auto, cpu, cuda, cuda:N"),
    "device number": ({"train.device": "0"}, "train.device=0 is not one of auto, cpu, cuda, cuda:N"),
    "device without number": ({"train.device": "cuda:"}, "train.device=cuda: is not one of auto"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)


@pytest.mark.parametrize(("steps", "rises"), [(1, 0), (9, 0), (30, 3), (499, 49), (600, 50), (800, 50), (10**6, 50)])
def test_the_warm_up_is_a_tenth_of_the_run_and_at_most_50_steps(steps, rises):
    assert warmup_steps(OptimConfig(), steps) == rises
    assert warmup_steps(OptimConfig(warmup=7), steps) == 7
