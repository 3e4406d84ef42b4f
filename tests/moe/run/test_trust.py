"""Whose code runs: nothing that a run's folder names is imported, unless it is said and lies elsewhere."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

import experiments.compare
import experiments.generate
import experiments.train
import experiments.upcycle
from experiments.compare import CompareConfig, compare
from moe.analysis.replay import Replay
from moe.errors import BadInput
from moe.run.folder import command_to_resume, read_config
from moe.run.load import load_run
from moe.run.trust import check_router
from moe.train.distill import load_teacher
from tests.small_runs import fate, settings, train, train_until

ROUTER = """
from pathlib import Path
from moe.routing.token_choice import TopKRouter

Path({marker!r}).touch()

class R(TopKRouter):
    def __init__(self, *arguments, **where):
        super().__init__(*arguments, **where)
        self.score = "softmax"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder on the path, as it is where a command is called, and the file whose presence says that code ran there.
    What was imported from it is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield SimpleNamespace(folder=tmp_path, ran=tmp_path / "ran")
    for name in [name for name in sys.modules if name.split(".")[0] in ("runs", "payload", "code_of_mine", "linked")]:
        del sys.modules[name]


def write_router(place, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ROUTER.format(marker=str(place.ran)))


def name_router(run, name):
    """Put a router's name into a run's config.yaml, and that it is to be trusted."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["router"]["name"], tree["trust"] = name, True
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def gift(place, whole):
    """A finished run from somebody, whose config names code that lies in its folder."""
    run = shutil.copytree(whole, place.folder / "runs" / "gift")
    write_router(place, run / "payload.py")
    name_router(run, "runs.gift.payload:R")
    return run


def _command(module, *words):
    """What a command line does: its exit status."""
    sys.argv = ["command", *words]
    GlobalHydra.instance().clear()
    try:
        module.main()
    except SystemExit as end:
        return end.code
    return 0


READERS = {
    "generate": lambda run, more: _command(experiments.generate, f"run={run}", "max_new=1", *more),
    "resume": lambda run, more: _command(experiments.train, f"run={run}", "resume=true", *more),
    "upcycle": lambda run, more: _command(experiments.upcycle, f"source={run}", "run=new", "method=grow", *more),
}


@pytest.mark.parametrize("trust", [(), ("trust=true",)], ids=["", "trusted"])
@pytest.mark.parametrize("reader", READERS)
def test_a_command_that_reads_a_run_never_runs_what_lies_in_its_folder(reader, trust, gift, place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    assert READERS[reader](gift, trust) == 2
    words = capsys.readouterr().err
    assert f"{gift}/config.yaml has router.name=runs.gift.payload:R, and {gift}/payload.py lies in the run's" in words
    assert not place.ran.exists()
    assert "runs.gift.payload" not in sys.modules


@pytest.mark.parametrize("reader", ["teacher", "recorded", "resumed comparison"])
def test_a_library_call_that_reads_a_run_never_runs_what_lies_in_its_folder(reader, gift, place, corpus):
    cfg = settings(corpus, place.folder / "mine", {"trust": True})
    cfg.distill.teacher = str(gift)
    match reader:
        case "recorded":
            cfg.balance.force, cfg.balance.recorded = "recorded", str(gift)
        case "resumed comparison":
            renamed = gift.rename(gift.with_name("moe-seed0"))
            gift.symlink_to(renamed)
            cfg = CompareConfig(**vars(cfg) | {"run": "runs", "resume": True})
    read = {
        "teacher": lambda: load_teacher(cfg, "", torch.device("cpu")),
        "recorded": lambda: Replay(cfg),
        "resumed comparison": lambda: compare(cfg, say=lambda _: None),
    }
    with pytest.raises(BadInput, match="lies in the run's own folder, from which nothing is imported"):
        read[reader]()
    assert not place.ran.exists()


@pytest.mark.parametrize("how", ["a link to it", "a link out of it", "a linked folder", "its package", "loaded"])
def test_links_and_packages_do_not_lead_into_a_runs_folder_or_out_of_it(how, place):
    run, name = place.folder / "runs" / "gift", "payload:R"
    write_router(place, run / "payload.py")
    match how:
        case "a link to it":
            (place.folder / "payload.py").symlink_to(run / "payload.py")
        case "a link out of it":
            name = "runs.gift.linked:R"
            write_router(place, place.folder / "elsewhere.py")
            (run / "linked.py").symlink_to(place.folder / "elsewhere.py")
        case "a linked folder":
            name = "linked.payload:R"
            (place.folder / "linked").symlink_to(run)
        case "its package":
            name = "runs.gift.inner.payload:R"
            write_router(place, run / "__init__.py")
            (place.folder / "code").mkdir()
            write_router(place, place.folder / "code" / "payload.py")
            (run / "inner").symlink_to(place.folder / "code")
        case "loaded":
            sys.modules["payload"] = SimpleNamespace(__file__=str(run / "payload.py"))
    with pytest.raises(BadInput, match="lies in the run's own folder"):
        check_router(run, name, True)
    assert not place.ran.exists()


@pytest.mark.parametrize("name", ["nowhere_at_all:R", "..:R", ":R", "json:R", "sys:R", "a b.c:R"])
def test_a_name_of_anything_is_refused_without_an_import(name, place):
    with pytest.raises(BadInput, match=r"has router\.name=.* say so with trust=true on this command line"):
        check_router(place.folder / "run", name, False)


def test_a_router_of_ones_own_is_imported_when_it_is_said_and_only_then(place, corpus, capsys):
    """From a killed run to a finished one, and read by its name, by trust=true, and not by trust in the folder or
    because it was imported before."""
    write_router(place, place.folder / "code_of_mine.py")
    run, name = place.folder / "runs" / "mine", "code_of_mine:R"
    cfg = settings(corpus, run, {"router.name": name, "resume": True, "train.steps": 3})
    train(settings(corpus, place.folder / "runs" / "whole", {"router.name": name, "train.steps": 3}))
    train_until(cfg, 3)
    assert place.ran.exists()
    name_router(run, name)
    for trust in (False, "code_of_mine:Other", "softmax"):
        with pytest.raises(BadInput) as refusal:
            load_run(run, "last", trust)
        assert f"would import code_of_mine ({place.folder}/code_of_mine.py): if you know that code" in str(
            refusal.value
        )
    assert command_to_resume(run, cfg).endswith("resume=true trust=true")

    def step(*words):
        return _command(experiments.train, f"run={run}", "resume=true", *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        assert step() == 2
        assert "trust=true on this command line, or with router.name=code_of_mine:R" in capsys.readouterr().err
        assert step(f"router.name={name}", "log.every=3") == 0
        assert step("trust=true") == 0
    assert fate(run)["model"] == fate(place.folder / "runs" / "whole")["model"]
    assert not read_config(run, name).trust
    assert load_run(run, "last", True)[2].router.name == load_run(run, "last", name)[2].router.name == name
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
