"""Claims about filling a tracker after the fact: it gets what it would have got while the run trained."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import track
from moe.run.summary import read_metrics
from moe.train.trackers import flatten
from tests.moe.train.test_trackers import board, pictures
from tests.small_runs import STEPS, TIMINGS, files, settings, train, train_until


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.track`."""

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["track.py", *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            track.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_tensorboard_gets_afterwards_what_it_gets_in_training_and_every_step_once(command, corpus, tmp_path, capsys):
    train(settings(corpus, tmp_path / "watched", {"log.tensorboard": True}))
    train(settings(corpus, tmp_path / "run"))
    capsys.readouterr()
    for _ in range(2):  # the second time what the first wrote counts no more
        code, out, err = command(f"run={tmp_path / 'run'}", "tensorboard=true")
        assert (code, err) == (0, "")
        assert out == f"{tmp_path / 'run'}: {STEPS + 1} lines sent to tensorboard\n"
    watched, filled = board(tmp_path / "watched"), board(tmp_path / "run")
    assert watched.keys() == filled.keys()
    assert {tag: filled[tag] for tag in filled if tag not in TIMINGS} == {
        tag: watched[tag] for tag in watched if tag not in TIMINGS
    }
    drawn = pictures(tmp_path / "watched")
    assert drawn
    assert {step: pixels.tolist() for step, pixels in pictures(tmp_path / "run").items()} == {
        step: pixels.tolist() for step, pixels in drawn.items()
    }
    assert filled["seconds"] == pytest.approx({line.step: line.seconds for line in read_metrics(tmp_path / "run")})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_settings_then_every_line_then_the_end(name, command, corpus, tmp_path, monkeypatch):
    train(settings(corpus, tmp_path / "run"))
    calls = []
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in ("init", "log", "finish"):
        record = lambda *arguments, function=function, **keywords: calls.append((function, arguments, keywords))
        setattr(module, function, record)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path / "run")  # a run called by where one stands has its name all the same
    code, out, err = command("run=.", f"{name}=my, project")
    assert (code, err) == (0, "")
    assert out.endswith(f"lines sent to {name}\n")
    (first, _, keywords), *logged, last = calls
    assert (first, keywords["project"], keywords["name"]) == ("init", "my, project", "run")
    assert keywords["config"]["optim"]["lr"] == settings(corpus, "").optim.lr
    lines = read_metrics(tmp_path / "run")
    assert logged == [("log", (flatten(line),), {"step": line.step}) for line in lines]
    assert last == ("finish", (), {})


def test_what_cannot_be_sent_is_one_sentence_and_nothing_is_written(command, corpus, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(corpus, whole))
    train_until(settings(corpus, cut), 5)
    capsys.readouterr()
    before = files(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == "wandb" else find_spec(module, *rest)
    )
    for arguments, words in (
        ((), "run= is needed: the folder of a finished run, like run=runs/demo/moe-seed0."),
        ((f"run={whole}",), "no tracker is named: give tensorboard=true, wandb=PROJECT or trackio=PROJECT."),
        ((f"run={cut}", "tensorboard=true"), f"run={cut} is not finished: it has no summary.json."),
        (
            (f"run={tmp_path}", "tensorboard=true"),
            f"run={tmp_path} is not a run's folder: it has no config.yaml; there",
        ),
        ((f"run={whole}", "wandb=mine"), "wandb=mine needs the package wandb, which is not installed: pip install"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {words}")
        assert err.count("\n") == 1
    path = whole / "metrics.jsonl"
    assert files(tmp_path) == before
    path.write_text("{\n" + path.read_text())
    code, out, err = command(f"run={whole}", "tensorboard=true")
    assert (code, out) == (2, "")
    assert "metrics.jsonl, line 1 is damaged" in err
    assert not (whole / "tensorboard").exists()
