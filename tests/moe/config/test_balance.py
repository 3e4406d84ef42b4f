"""Balance: terms that mean nothing to a router, or contradict one another."""

import pytest

from tests.moe.config.refusals import refusal

IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "a balance term without scores": (
        {"router.name": "hash"},
        "balance.aux=0.01 reads scores, and router.name=hash gives none: set balance.aux=0",
    ),
    "a load loss without noise": ({"balance.load": 0.1}, "balance.load=0.1 needs router.noisy=true"),
    "capacity where experts choose": (
        {"router.name": "expert-choice", "balance.capacity": 1.0},
        "balance.capacity=1.0 has no meaning for router.name=expert-choice",
    ),
    "capacity and token rounding": ({"balance.capacity": 1.0, "balance.tile": 8}, "choose one of them"),
    "a next expert without capacity": ({"balance.overflow": "next"}, "balance.overflow=next needs balance.capacity"),
    "a schedule of nothing": ({"balance.schedule": {"auxx": [1.0]}}, "balance.schedule.auxx is not a coefficient"),
    "an empty schedule": ({"balance.schedule": {"aux": []}}, "must be a list of factors of at least 0"),
    "bias without bias": ({"balance.bias_rate": 0.001}, "balance.bias_rate=0.001 needs a selection bias"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)
