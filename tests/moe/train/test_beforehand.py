"""Claims about what is refused before any text is read."""

import pytest

from moe.errors import BadInput
from moe.train.beforehand import check
from tests.small_runs import settings, train

WRONG = {
    "router": ({"router.name": "nothing_there:Router"}, "router.name=nothing_there:Router cannot be imported"),
    "tokenizer": (
        {"tokenizer.name": "saved", "tokenizer.path": "/nowhere"},
        "/nowhere/tokenizer/tokenizer.json",
    ),
    "source": ({"source": "/nowhere"}, "source=/nowhere is neither a run's folder nor a checkpoint"),
    "teacher": ({"distill.teacher": "/nowhere"}, "distill.teacher=/nowhere is not a run's folder"),
    "recording": (
        {"balance.recorded": "/nowhere", "balance.force": "recorded"},
        "balance.recorded=/nowhere is not a run's folder",
    ),
    "device": ({"train.device": "cuda:99"}, "train.device=cuda:99"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_run_names_and_cannot_have_is_refused_before_the_text_is_read(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("moe.train.loop.prepare", lambda *_: pytest.fail("the text was read"))
    changes, sentence = WRONG[name]
    with pytest.raises(BadInput, match=sentence):
        train(settings(corpus, tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distill.which": "step-00000099"}, "which=step-00000099 is not one of best, last, step-"),
        ({"model.context": 64}, "has model.context=32, and this run 64"),
    ],
)
def test_a_teacher_that_cannot_teach_this_run_is_refused(changes, sentence, corpus, tmp_path):
    train(settings(corpus, tmp_path / "teacher", {"train.steps": 2}))
    student = {"distill.teacher": str(tmp_path / "teacher"), "distill.weight": 0.5}
    check(settings(corpus, tmp_path / "run", student))
    with pytest.raises(BadInput, match=sentence):
        check(settings(corpus, tmp_path / "run", student | changes))


def test_a_finished_run_needs_nothing_that_it_came_from(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"train.steps": 2})
    train(cfg)
    cfg.resume, cfg.distill.teacher, cfg.distill.weight = True, "/gone", 0.5
    check(cfg)
