"""Claims about the command that trains: what it writes, and how it goes on."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest

import experiments.train
from moe.data.tokenizer import Tokenizer
from moe.run.folder import read_config
from moe.run.jsonl import read_lines
from tests.experiments.train_command import words
from tests.small_runs import STEPS, fate, settings, train, train_until


def test_ctrl_c_before_training_is_one_word_and_status_130(monkeypatch, tmp_path, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.train, "train", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="130"):
        experiments.train.main()
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_trains_and_writes_nothing_but_its_run(command, corpus, tmp_path):
    status, _, err, _ = command(*words(corpus, "some/run"), really=True)
    assert (status, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    assert json.loads((tmp_path / "some" / "run" / "summary.json").read_text())["steps"] == STEPS
    own = read_config(tmp_path / "some" / "run")
    assert own.model.moe.d_expert == 16


def test_a_multirun_leaves_a_run_for_each(command, corpus, tmp_path):
    arguments = words(corpus, "sweep/${seed}", {"train.steps": 2})
    status, _, err, _ = command("-m", *arguments, "seed=4,5", really=True)
    assert (status, err) == (0, "")
    found = {path.name: json.loads((path / "summary.json").read_text()) for path in (tmp_path / "sweep").iterdir()}
    assert {name: summary["seed"] for name, summary in found.items()} == {"4": 4, "5": 5}
    assert found["4"]["val"] != found["5"]["val"]


@pytest.fixture
def interrupted(corpus, tmp_path):
    """A folder of a run that was killed, with settings that are no defaults."""
    cfg = settings(corpus, tmp_path / "run", {"log.tensorboard": True, "optim.lr": 3e-3})
    train_until(cfg, 5)
    return tmp_path / "run"


def test_resuming_needs_no_setting_but_the_folder(command, interrupted, corpus, tmp_path):
    train(settings(corpus, tmp_path / "whole", {"optim.lr": 3e-3}))
    status, _, err, _ = command(f"run={interrupted}", "resume=true", really=True)
    assert (status, err) == (0, "")
    assert fate(interrupted) == fate(tmp_path / "whole")


def test_what_is_not_given_on_resuming_is_the_runs_own(command, interrupted, corpus):
    """Also where its data is kept and how it is watched: those may be given anew, and then are."""
    own = read_config(interrupted)
    _, _, _, (cfg,) = command(f"run={interrupted}", "resume=true")
    own.resume = True
    assert cfg == own
    _, _, _, (cfg,) = command(
        f"run={interrupted}", "resume=true", "log.every=7", "data.on_error=skip", "data.cache=there"
    )
    own.log.every, own.data.on_error, own.data.cache = 7, "skip", "there"
    assert cfg == own
    assert own.log.tensorboard


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["optim.lr=1"], "optim.lr=1.0 differs from the run's own 0.003"),
        (["model=cpu-nano"], "model.name=cpu-nano differs from the run's own cpu-small"),
        (["model.moe=null"], "model.moe.n_experts=None differs from the run's own 4"),
        (["log.every=3", "seed=1"], "seed=1 differs from the run's own 0"),
    ],
)
def test_a_setting_changed_on_resuming_is_named(given, named, command, interrupted):
    lines = read_lines(interrupted / "metrics.jsonl")
    status, _, err, _ = command(f"run={interrupted}", "resume=true", *given, really=True)
    assert status == 2
    assert err.startswith(f"error: {named}: leave it out to go on with {interrupted}")
    assert read_lines(interrupted / "metrics.jsonl") == lines


def test_the_command_line_is_validated_over_the_runs_own_settings(command, corpus, tmp_path):
    """The defaults' warm-up of 50 steps and their own K are nothing to a run that has others."""
    train_until(settings(corpus, tmp_path / "run", {"model.moe.n_experts": 3}), 5)
    run = f"run={tmp_path / 'run'}"
    status, _, err, configs = command(run, "resume=true", "checkpoint.every=1")
    assert (status, err) == (0, "")
    assert (configs[0].optim.warmup, configs[0].train.steps, configs[0].checkpoint.every) == (2, STEPS, 1)
    status, _, err, _ = command(run, "resume=true", f"train.steps={STEPS + 1}", really=True)
    assert status == 2
    assert err.startswith(f"error: train.steps={STEPS + 1} differs from the run's own {STEPS}")
    anew = f"source={tmp_path / 'run'} source_state=all run=NEW train.steps={STEPS + 1}"
    assert err.endswith(f", or start a new run from this one's weights with {anew}.\n")
    status, _, err, _ = command(run, "resume=true", "model.moe.k=4")
    assert status == 2
    assert err.startswith("error: model.moe.k=4 exceeds model.moe.n_experts=3: ")
    status, _, err, _ = command("-m", run, "resume=true", "model.moe.k=2,4")
    assert err.endswith("(in the sweep's job model.moe.k=4).\n")


def test_a_setting_of_a_group_that_the_run_does_not_have_is_refused(command, corpus, tmp_path):
    train_until(settings(corpus, tmp_path / "run", {"model.moe": None}), 2)
    status, _, err, _ = command(f"run={tmp_path / 'run'}", "resume=true", "model.moe.k=2")
    assert status == 2
    assert err.startswith("error: model.moe.k=2 means nothing here: model.moe is null")


def test_repeating_the_whole_command_goes_on(command, corpus, tmp_path):
    arguments = words(corpus, tmp_path / "run")
    train_until(settings(corpus, tmp_path / "run"), 5)
    status, _, err, _ = command(*arguments, really=True)
    assert status == 2
    assert "add resume=true" in err
    status, _, err, _ = command(*arguments, "resume=true", really=True)
    assert (status, err) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=" + "n" * 300], "File name too long: a name may have up to 255 bytes; choose a shorter one"),
        (["run=" + "n" * 250], "File name too long"),
        (["run=config.yaml/run"], "run=config.yaml/run cannot be created"),
    ],
)
def test_a_folder_that_no_file_system_takes_is_one_sentence(arguments, sentence, command, corpus, tmp_path):
    (tmp_path / "config.yaml").touch()
    status, _, err, _ = command(*words(corpus, "unused"), *arguments, really=True)
    assert status == 2
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_file_of_a_run_that_cannot_be_read_on_resuming_is_named(name, command, interrupted, monkeypatch):
    opened = Path.open

    def refuse(self, *arguments, **keywords):
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    status, _, err, _ = command(f"run={interrupted}", "resume=true", really=True)
    assert status == 2
    assert f"{interrupted / name}" in err
    assert "Permission denied" in err
    assert err.count("\n") == 1


def test_a_run_keeps_the_number_of_steps_that_its_learning_rate_rises(corpus, tmp_path):
    train_until(settings(corpus, tmp_path / "run", {"optim.warmup": -1, "train.steps": 23}), 4)
    assert read_config(tmp_path / "run").optim.warmup == 2
    rates = [line["lr"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert rates[:2] == [rates[1] / 2, max(rates)]


def test_a_run_of_another_default_goes_on_with_its_own_warm_up(corpus, tmp_path):
    """Also where the whole command is repeated, which gives none."""
    train(settings(corpus, tmp_path / "whole", {"optim.warmup": 5}))
    train_until(settings(corpus, tmp_path / "run", {"optim.warmup": 5}), 4)
    train(settings(corpus, tmp_path / "run", {"optim.warmup": -1, "resume": True}))
    assert fate(tmp_path / "run") == fate(tmp_path / "whole")


def test_a_short_run_needs_no_other_setting(command):
    status, _, err, (cfg,) = command("train.steps=30")
    assert (status, err, cfg.train.steps) == (0, "", 30)


@pytest.fixture
def source(corpus, tmp_path):
    """A finished run with settings that are no defaults, of a tokenizer learned from its text."""
    changes = {"tokenizer.name": "bpe", "tokenizer.vocab_size": 300, "router.name": "sigmoid", "balance.aux": 0.03}
    train(settings(corpus, tmp_path / "source", changes | {"data.documents": "separate", "train.steps": 3}))
    return tmp_path / "source"


def of_text(corpus) -> list[str]:
    """The words that say which text to read, and how long."""
    keys = ("data=", "data.path", "data.cache", "data.val_fraction", "train.", "optim.")
    return [word for word in words(corpus, "") if word.startswith(keys)]


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000003"])
def test_a_run_from_anothers_weights_needs_none_of_its_settings(place, command, source, corpus, tmp_path):
    own = read_config(source)
    given = [*of_text(corpus), f"source={source / place}", "run=new", "train.steps=2", "data.max_mb=3"]
    status, _, err, _ = command(*given, really=True)
    assert (status, err) == (0, "")
    new = read_config(tmp_path / "new")
    assert (new.model, new.router, new.balance) == (own.model, own.router, own.balance)
    assert (new.data.documents, new.data.max_mb, new.train.steps) == ("separate", 3.0, 2)
    assert (new.tokenizer.name, new.tokenizer.path) == ("saved", str(source))
    assert Tokenizer.load(tmp_path / "new" / "tokenizer").ranks == Tokenizer.load(source / "tokenizer").ranks


def test_all_of_a_source_goes_on_with_none_of_its_settings_but_the_schedule(command, source, corpus, tmp_path):
    given = [*of_text(corpus), f"source={source}", "source_state=all", "run=new", "train.steps=5", "data.on_error=skip"]
    status, _, err, _ = command(*given, really=True)
    assert (status, err) == (0, "")
    assert [line["step"] for line in read_lines(tmp_path / "new" / "metrics.jsonl")] == [4, 5]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("model.d_model=48", "model.d_model=48"),
        ("model=cpu-nano", "model.d_model=64"),
        ("model.moe=null", "model.moe=null"),
        ("experiment=demo", "model.d_model=64"),
        ("model.moe.n_experts=8", "model.moe.n_experts=8"),
    ],
)
def test_a_given_setting_that_does_not_fit_the_sources_weights_is_refused(given, named, command, source, corpus):
    status, _, err, configs = command(*of_text(corpus), f"source={source}", "run=new", given)
    assert (status, configs) == (2, [])
    assert err.startswith(f"error: {named} does not fit the weights of source={source}, which have "), err
    assert err.endswith("leave it out, and the source's own is taken.\n")
    assert err.count("\n") == 1


def test_a_source_cannot_be_given_to_a_run_that_began_otherwise(command, source, corpus, tmp_path):
    given = [*of_text(corpus), f"source={source}", "run=new", "train.steps=2"]
    assert command(*given, really=True)[0] == 0
    newest = source / "checkpoints" / "step-00000003"
    cases = {source: "did not begin from another's weights", "new": f"began from {newest}"}
    for run, began in cases.items():
        status, _, err, _ = command(f"run={run}", f"source={tmp_path / 'new'}", "resume=true", really=True)
        assert status == 2
        assert f" is given, and {run} {began}: leave it out to go on with {run}, or choose another run.\n" in err


def test_what_a_routers_file_comes_with_lies_over_the_source(command, source, corpus):
    _, _, err, (cfg,) = command(*of_text(corpus), f"source={source}", "run=new", "router=switch")
    own = read_config(source)
    assert (err, cfg.router.name, cfg.model.d_model) == ("", "softmax", own.model.d_model)
    assert (cfg.model.moe.k, own.model.moe.k) == (1, 2)


@pytest.mark.parametrize("name", ["nothing_there:Router", "broken_router:Router", "broken_router:Other"])
def test_a_router_that_cannot_be_imported_is_refused_before_the_data_is_read(
    name, command, corpus, tmp_path, monkeypatch
):
    (tmp_path / "broken_router.py").write_text("raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, out, err, _ = command(*words(corpus, "some/run", {"router.name": name}), really=True)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: router.name={name} cannot be imported: ")
    assert not (tmp_path / "some").exists()


def test_a_router_that_cannot_be_built_leaves_no_folder(command, corpus, tmp_path, monkeypatch):
    text = "from moe.routing.contract import Router\nclass Bad(Router):\n  def __init__(self): pass\n"
    (tmp_path / "bad_router.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    command(*words(corpus, "some/run", {"router.name": "bad_router:Bad"}), really=True)
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("router.name=softmax,nothing_there:Router", "router.name=nothing_there:Router cannot be imported"),
        ("distill.teacher='',nowhere", "distill.teacher=nowhere is not a run's folder"),
        ("source='',nowhere", "source=nowhere is neither a run's folder nor a checkpoint"),
    ],
)
def test_what_a_job_names_and_cannot_have_is_refused_before_the_first_job_trains(wrong, sentence, command, corpus):
    status, out, err, configs = command("-m", *words(corpus, ""), "seed=0,1", wrong)
    assert (status, out, configs) == (2, "", [])
    assert err.startswith(f"error: {sentence}"), err
    assert err.endswith(f"(in the sweep's job seed=0 {wrong.partition('=')[0]}={wrong.rpartition(',')[2]}).\n"), err
    assert err.count("\n") == 1


def test_texts_that_a_job_would_read_and_are_not_there_are_refused_before_the_first(command, corpus):
    arguments = [word for word in words(corpus, "") if not word.startswith("data.path")]
    status, out, err, configs = command("-m", *arguments, f"data.path={corpus / 'texts'},nowhere")
    assert (status, out, configs) == (2, "", [])
    assert err.startswith("error: data.path=nowhere does not exist; accepted is a file, a folder or a glob (in the"), (
        err
    )


def test_a_tokenizer_that_a_job_would_take_and_is_not_there_is_refused_before_the_first(command, corpus):
    arguments = [word for word in words(corpus, "") if not word.startswith(("tokenizer", "run="))]
    given = ["tokenizer=saved", "tokenizer.path=nowhere", "seed=0,1"]
    status, out, err, configs = command("-m", *arguments, *given)
    assert (status, out, configs) == (2, "", [])
    assert err.startswith("error: nowhere/tokenizer/tokenizer.json cannot be read: No such file or directory"), err
