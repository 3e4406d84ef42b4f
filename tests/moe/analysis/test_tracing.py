"""Claims about tracing a run."""

import pytest

from moe.analysis.trace import Trace
from moe.analysis.tracing import What, trace_run
from moe.errors import BadInput
from tests.small_runs import settings, train


def test_two_traces_of_the_same_text_are_the_same_and_have_one_key(corpus, tmp_path):
    run = tmp_path / "run"
    train(settings(corpus, str(run), {"train.steps": 2}))
    for name, batch_size in (("a", 1), ("b", 7)):
        writer = trace_run(run, "last", What(tokens=300, batch_size=batch_size), tmp_path / name)
        assert writer.n_tokens == 288
    one, other = Trace(tmp_path / "a"), Trace(tmp_path / "b")
    assert one.about == other.about
    assert one.about.what == What(tokens=300).key() != What(tokens=200).key()
    assert one.experts().tolist() == other.experts().tolist()


def test_a_file_that_was_written_anew_has_another_key(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = What(str(path)).key()
    assert before == What(str(path)).key()
    path.write_text("other")
    assert What(str(path)).key() != before
    with pytest.raises(BadInput, match=r"none\.txt cannot be read"):
        What(str(tmp_path / "none.txt")).key()
