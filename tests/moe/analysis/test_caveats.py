"""Claims about what is said of metrics: it is what the results on planted routers are, and one sentence each."""

from pathlib import Path

from experiments import readme
from experiments.stats import recovery
from moe.analysis.caveats import CAVEATS
from moe.run.jsonl import read_records


def test_what_is_drawn_is_what_answers_its_question_in_the_results():
    lines = read_records(recovery.Line, Path(readme.RESULTS, "trust.jsonl"))
    answers = recovery.answers(lines)
    assert answers == {metric: caveat.drawn for metric, caveat in CAVEATS.items() if caveat.asks}
    assert set(answers.values()) == {True, False}


def test_metrics_of_another_question_are_drawn_for_that():
    assert all(caveat.drawn for caveat in CAVEATS.values() if not caveat.asks)


def test_every_metric_that_is_tried_has_its_caveat_and_it_is_one_sentence():
    assert list(CAVEATS) == list(recovery.SCORES)
    for caveat in CAVEATS.values():
        assert caveat.cannot_tell.endswith(".")
        assert ". " not in caveat.cannot_tell
        assert len(caveat.cannot_tell) < 120
        assert caveat.asks in ("", *recovery.TRUTH)
