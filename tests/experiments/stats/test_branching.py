"""Claims about what branch-train-mix came to, on rows made by hand."""

import math

import pytest

from experiments.stats.branching import Row, against, arms_of, at_home, bits, by_chance, losses, shares


def row(seed, arm, loss, counts=None, k=None):
    return Row(seed, arm, 10, 1e9, loss, {"a": loss + 1, "b": loss - 1}, counts, k)


def test_arms_are_paired_by_seed_whatever_the_order_of_lines():
    rows = [row(1, "mixed", 2.0), row(0, "mixed", 1.0), row(0, "scratch", 1.5), row(1, "scratch", 2.4)]
    judgement = against(rows, "mixed", "scratch")
    assert judgement.mean == pytest.approx(-0.45)
    assert judgement.deviation == pytest.approx(0.1 / math.sqrt(2))
    assert against(rows, "mixed", "scratch", "b").mean == pytest.approx(-0.45)
    assert losses(rows, "scratch", "a").mean == pytest.approx(2.95)
    assert arms_of(rows) == ["mixed", "scratch"]


def test_an_arm_without_one_of_the_seeds_is_not_compared():
    with pytest.raises(ValueError, match="argument 2 is"):
        against([row(0, "mixed", 1.0), row(1, "mixed", 1.0), row(0, "scratch", 1.0)], "mixed", "scratch")


def test_the_share_at_home_is_of_the_diagonal_over_layers_and_domains():
    """Two experts, one a token: in layer 0 each domain is its own expert's, in layer 1 three quarters go elsewhere."""
    home = row(0, "mixed", 1.0, [[[8, 0], [0, 4]], [[2, 6], [3, 1]]], 1)
    assert shares(home, 1).tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert at_home(home) == pytest.approx((1 + 1 + 0.25 + 0.25) / 4)
    assert by_chance(home) == 0.5


def test_bits_of_domain_are_one_for_two_even_domains_apart_and_none_for_alike():
    assert bits(row(0, "mixed", 1.0, [[[5, 0], [0, 5]], [[5, 5], [5, 5]]], 1)) == pytest.approx(0.5)


def test_a_dense_model_has_no_shares():
    with pytest.raises(ValueError, match="dense is a dense model"):
        bits(row(0, "dense", 1.0))
