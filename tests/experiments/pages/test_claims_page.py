"""Claims about the ledger's page."""

from pathlib import Path

from experiments import claims
from experiments.pages import claims_page
from experiments.stats import ledger
from experiments.stats.ledger import CLAIMS, Contrast
from tests.experiments.stats.test_ledger import _row, _rows

ROOT = Path(__file__).resolve().parents[3]


def _cells(expected, rows, quantity="loss", against="old"):
    return claims_page.contrast_cells(ledger.finding(Contrast("new", against, expected, quantity), rows, 0.01))


def test_a_line_says_what_was_compared_the_effect_the_verdict_and_what_could_have_been_shown():
    compared, expected, effect, verdict, shown = _cells("lower", _rows([-0.10, -0.11, -0.09, -0.10, -0.12]))
    assert (compared, expected) == ("new − old: validation loss", "lower")
    assert effect == "−0.104 (−0.118 to −0.090) nats"
    assert verdict == "confirmed"
    assert 0 < float(shown) < 0.1


def test_what_is_undecided_says_how_many_seeds_would_decide():
    verdict = _cells("lower", _rows([-0.10, 0.05, -0.12, 0.02, -0.04]))[3]
    assert verdict.startswith("inconclusive; about ")
    assert verdict.endswith(" seeds would decide")


def test_one_seed_a_small_effect_and_none_at_all_are_called_so():
    assert _cells("lower", _rows([-0.5]))[3] == "inconclusive: one seed gives no verdict"
    small = [-0.0040, -0.0041, -0.0039, -0.0040, -0.0042]
    assert _cells("lower", _rows(small))[3] == "confirmed, though within the margin"
    assert _cells("higher", _rows([0.0, 0.0, 0.0]))[3] == "contradicted: no difference in any seed"


def test_a_leak_is_told_as_it_is_and_in_how_many_seeds():
    rows = [_row("new", seed, leak=0.0) for seed in range(3)]
    assert _cells("lower", rows, "leak", ledger.LEAK)[2:4] == ("0 logits", "confirmed (in each of 3 seeds)")


def test_the_page_is_that_of_the_recorded_runs():
    cfg = claims.ClaimsConfig(results=str(ROOT / "experiments" / "results"))
    rows = [claims.read_rows(claims.file_of(cfg, tier)) for tier in ("cpu", "gpu")]
    assert (ROOT / "docs" / "claims.md").read_text() == claims_page.page(*rows)


def test_the_page_has_every_claim_and_says_of_what_it_is():
    page = claims_page.page(_rows([-0.1, -0.2]))
    for claim in CLAIMS:
        assert f"| {claim.text}" in page
    assert "On a GPU\n\nNot run" in page
    assert "Scale: 5 active of 9 parameters, 100 tokens" in page
