"""Claims about what is refused before any text is read."""

import sys

import pytest

from moe.errors import BadInput
from moe.train import beforehand
from moe.train.beforehand import check
from tests.small_runs import fate, settings, train

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
    "text": ({"data.path": "/nowhere"}, "data.path=/nowhere does not exist; accepted is a file, a folder or a glob"),
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


OWN = """
import torch
from moe.routing.contract import Router, Routing

class Own(Router):
    def forward(self, x_TD, backend, context):
        expert_TK = torch.rand(len(x_TD), self.n_experts).topk(self.k).indices
        weight_TK, scalar = x_TD.new_full(expert_TK.shape, 0.5), x_TD.new_zeros(())
        return Routing(expert_TK, weight_TK, None, losses={LOSSES: scalar}, observed={OBSERVED: scalar})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """(losses' name, what is observed) -> the name of a router of one's own with these."""
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("switchyard_clashing_router", None)

    def write(losses="mine", observed="ours"):
        text = OWN.replace("LOSSES", repr(losses)).replace("OBSERVED", repr(observed))
        (tmp_path / "switchyard_clashing_router.py").write_text(text)
        return {"router.name": "switchyard_clashing_router:Own"}

    yield write
    sys.modules.pop("switchyard_clashing_router", None)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"losses": "aux"}, "gives a loss named aux, which is balance.aux's"),
        ({"losses": "grad_norm"}, "gives a loss named grad_norm, which is another number's of the same step"),
        ({"observed": "count"}, "observes count, which is what the layer observes by that name"),
    ],
)
def test_a_routers_names_that_are_taken_are_refused_before_the_run_has_a_folder(names, sentence, own, corpus, tmp_path):
    with pytest.raises(BadInput, match=sentence):
        train(settings(corpus, tmp_path / "runs" / "run", own(**names)))
    assert not (tmp_path / "runs").exists()


def test_trying_a_router_of_ones_own_changes_nothing_of_its_run(own, corpus, tmp_path, monkeypatch):
    changes = own() | {"train.steps": 3}
    train(settings(corpus, tmp_path / "tried", changes))
    monkeypatch.setattr(beforehand, "rehearse", lambda *_: None)
    train(settings(corpus, tmp_path / "untried", changes))
    assert fate(tmp_path / "tried") == fate(tmp_path / "untried")


def test_a_rank_that_does_not_see_the_runs_folder_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    beforehand.check_seen(tmp_path)
    with pytest.raises(BadInput, match=r"run=.*/elsewhere cannot be seen by rank 0: all ranks must see one folder"):
        beforehand.check_seen(tmp_path / "elsewhere")
