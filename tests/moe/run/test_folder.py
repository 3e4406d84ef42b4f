"""Claims about a run's folder: what is refused leaves everything as it was, and what is there is whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

import moe.train.loop
import moe.train.step
import moe.train.trackers
from moe.config import parse
from moe.config.parse import to_dict
from moe.config.run import Config
from moe.data.prepare import prepare
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.run import checkpoint
from moe.run.folder import check_same, create_folder, default_folder, read_config
from moe.run.jsonl import read_lines
from moe.run.load import load_run
from moe.run.summary import read_summary
from tests.small_runs import (
    STEPS,
    Killed,
    fate,
    files,
    left_by_others,
    settings,
    silent,
    train,
    train_until,
    write_texts,
)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(corpus, folder))
    return folder


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    train_until(settings(corpus, folder), 5)
    return folder


def no_training(monkeypatch):
    def refuse(*arguments):
        raise Killed("a step was taken")

    monkeypatch.setattr(moe.train.loop, "take_step", refuse)


@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_an_existing_run_is_refused_without_resume_and_left_byte_for_byte(which, corpus, request):
    folder = request.getfixturevalue(which)
    before = files(folder)
    with pytest.raises(BadInput, match="exists: add resume=true to go on with it"):
        train(settings(corpus, folder))
    assert files(folder) == before


def test_an_existing_folder_that_is_no_run_is_refused_and_left_as_it_was(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        before = files(tmp_path)
        with pytest.raises(BadInput, match="mine"):
            train(settings(corpus, tmp_path / "mine", {"resume": resume}))
        assert files(tmp_path) == before


def test_resuming_a_finished_run_returns_its_summary_without_training(finished, corpus, monkeypatch):
    no_training(monkeypatch)
    before = files(finished)
    summary = train(settings(corpus, finished, {"resume": True}))
    assert summary == read_summary(finished)
    assert summary.steps == json.loads((finished / "summary.json").read_text())["steps"] == STEPS
    assert files(finished) == before


CHANGED = {
    "seed": 1,
    "dispatch": "reference",
    "model.n_layers": 3,
    "model.moe.k": 3,
    "model.vocab_size": 300,
    "router.name": "sigmoid",
    "balance.aux": 0.5,
    "optim.lr": 0.1,
    "optim.betas": [0.8, 0.9],
    "train.steps": STEPS + 1,
    "train.batch_size": 8,
    "train.precision": "bf16",
    "train.eval_tokens": 512,
    "train.accumulate": 2,  # the balancing loss of the defaults is a micro-batch's
}


@pytest.mark.parametrize("key", CHANGED)
@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_going_on_with_changed_settings_is_refused_naming_the_key(which, key, corpus, request, monkeypatch):
    folder = request.getfixturevalue(which)
    no_training(monkeypatch)
    before = files(folder)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, folder, {"resume": True, key: CHANGED[key]}))
    assert str(caught.value).startswith(f"{key}={CHANGED[key]} differs from the run's own ")
    assert files(folder) == before


def test_of_several_changed_settings_the_first_is_named_every_time(corpus, tmp_path):
    old = settings(corpus, tmp_path)
    new = settings(corpus, tmp_path, {"seed": 1, "optim.lr": 0.1, "model.n_layers": 3})
    with pytest.raises(BadInput, match=r"^seed=1 "):
        check_same(old, new)


def test_what_no_step_taken_depends_on_may_change_and_is_said_and_kept(interrupted, corpus, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    changes = {"train.non_finite": "skip", "train.eval_every": 3, "train.threads": 2, "checkpoint.keep": 5}
    changes |= {"train.checkpoint_activations": True, "checkpoint.every": 1}
    said: list[str] = []
    train(settings(corpus, tmp_path / "run", {"resume": True, **changes}), said.append)
    for key, value in changes.items():
        assert any(line.startswith(f"run: {key} was ") and f" is {value} " in line for line in said), key
        assert parse.lookup(read_config(tmp_path / "run"), key) == value
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "val" in line] == [0, 2, 3, 6, 7]
    assert {f"step-{step:08d}" for step in (4, 5, 6, 7)} <= {
        path.name for path in (tmp_path / "run/checkpoints").iterdir()
    }


@pytest.mark.parametrize(
    ("own", "alike"),
    [
        ({"model.moe": None}, True),
        ({"balance.scope": "sequence"}, True),
        ({"balance.scope": "global"}, True),
        ({"balance.aux": 0.0}, True),
        ({}, False),
        ({"balance.aux": 0.0, "balance.capacity": 1.0}, False),
        ({"balance.aux": 0.0, "balance.importance": 0.1}, False),
        ({"balance.scope": "sequence", "balance.spread": 0.1}, False),
        ({"balance.scope": "global", "balance.importance": 0.1}, True),
        ({"balance.aux": 0.0, "router.name": "relu"}, False),
        ({"balance.aux": 0.0, "router.name": "relu", "balance.scope": "global"}, True),
        ({"balance.aux": 0.0, "router.jitter": 0.1}, False),
        ({"balance.aux": 0.0, "router.name": "sinkhorn"}, False),
    ],
)
def test_micro_batches_may_change_where_a_step_is_the_same_however_it_is_split(own, alike, corpus, tmp_path):
    old, new = settings(corpus, tmp_path, own), settings(corpus, tmp_path, own | {"train.accumulate": 2})
    if alike:
        assert check_same(old, new) == ["train.accumulate was 1 and is 2 from here on."]
    else:
        with pytest.raises(BadInput, match=r"^train.accumulate=2 differs from the run's own 1"):
            check_same(old, new)


EDITED = {
    "optim.lr": 0.5,
    "optim.betas": [0.5, 0.6],
    "model.moe.k": 3,
    "router.scale": 2.0,
    "balance.z": 0.5,
    "seed": 9,
    "train.steps": STEPS + 5,
}


@pytest.mark.parametrize("which", ["finished", "interrupted"])
@pytest.mark.parametrize("key", EDITED)
def test_a_config_edited_by_hand_is_refused_naming_the_key(which, key, corpus, request, tmp_path, monkeypatch):
    """The checkpoint knows what the run was trained with, whatever config.yaml says."""
    shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    no_training(monkeypatch)
    edit(tmp_path / "run" / "config.yaml", key, EDITED[key])
    before = files(tmp_path / "run")
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run", {"resume": True, key: EDITED[key]}))
    assert str(caught.value).startswith(f"{tmp_path / 'run' / 'config.yaml'} has {key}={EDITED[key]}, and ")
    assert str(caught.value).endswith(f" back, or choose another run to train with {EDITED[key]}.")
    assert files(tmp_path / "run") == before


def edit(path: Path, key: str, value) -> None:
    """Change one value of a config.yaml."""
    tree = yaml.safe_load(path.read_text())
    *groups, name = key.split(".")
    group = tree
    for part in groups:
        group = group[part]
    group[name] = value
    path.write_text(yaml.safe_dump(tree))


def test_a_model_is_not_read_back_with_settings_edited_by_hand(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    edit(tmp_path / "run" / "config.yaml", "optim.lr", 0.5)  # says nothing of the model
    load_run(tmp_path / "run")
    edit(tmp_path / "run" / "config.yaml", "router.scale", 2.0)
    with pytest.raises(BadInput, match=r"config\.yaml has router.scale=2.0, and .* was trained with 1.0"):
        load_run(tmp_path / "run")


def test_where_a_run_is_kept_and_how_it_is_watched_may_change(interrupted, corpus, tmp_path):
    shutil.copytree(interrupted, tmp_path / "moved")
    changes = {"resume": True, "log.every": 1, "data.workers": 1, "data.cache": str(tmp_path / "cache")}
    assert train(settings(corpus, tmp_path / "moved", changes)).steps == STEPS


REFUSED = {
    "a vocabulary larger than the model's": ({"model.vocab_size": 100}, "model.vocab_size=100 is smaller than the 257"),
    "a missing corpus": ({"data.path": "/nowhere"}, "data.path=/nowhere"),
    "a training split shorter than one sequence": ({"model.context": 10**6}, "fewer than the 1000001 of one sequence"),
    "a device that is not here": ({"train.device": "cuda:99"}, "train.device=cuda:99 is not here"),
    "a missing tracker": ({"log.wandb": "project"}, "log.wandb=project needs the package wandb"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_leaves_no_folder(what, corpus, tmp_path, monkeypatch):
    changes, message = REFUSED[what]
    find_spec = moe.train.trackers.importlib.util.find_spec
    monkeypatch.setattr(
        moe.train.trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "runs" / "run", changes))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_data_on_resuming_is_refused(tmp_path):
    """The shards are of the data now there; the checkpoint was trained on other ones."""
    write_texts(tmp_path / "texts")
    cfg = settings(tmp_path, tmp_path / "run")
    train_until(cfg, 5)
    (tmp_path / "texts" / "chess" / "new.txt").write_text(" ".join(str(i) for i in range(500)))
    cfg.resume = True
    before = files(tmp_path / "run")
    with pytest.raises(BadInput, match="the hash of the prepared corpus"):
        train(cfg)
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("killed_at", [1, 5], ids=["before the first checkpoint", "after it"])
def test_another_tokenizer_on_resuming_is_refused(killed_at, tmp_path):
    """One of the same size, too. The run's own tokenizer is what its samples will be read with."""
    write_texts(tmp_path / "texts")
    cfg = settings(tmp_path, tmp_path / "run", {"tokenizer.name": "char"})
    train_until(cfg, killed_at)
    for path in (tmp_path / "texts" / "chess").iterdir():
        path.write_text(path.read_text().replace("é", "æ"))
    cfg.resume = True
    before = files(tmp_path / "run")
    with pytest.raises(BadInput, match="has another tokenizer"):
        train(cfg)
    assert files(tmp_path / "run") == before


def test_what_is_deleted_while_a_run_trains_is_there_again_at_its_end(finished, corpus, tmp_path, monkeypatch):
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        if state.step == 4:
            for name in ("metrics.jsonl", "config.yaml", "tokenizer/tokenizer.json"):
                (tmp_path / "run" / name).unlink()
            for name in ("routing", "checkpoints"):
                shutil.rmtree(tmp_path / "run" / name)
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    train(settings(corpus, tmp_path / "run"))
    assert fate(tmp_path / "run") == fate(finished)
    for name in ("tokenizer/tokenizer.json", "tokenizer/ranks.tiktoken"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    assert read_config(tmp_path / "run") == dataclasses.replace(read_config(finished), run=str(tmp_path / "run"))


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '{"schema": []}', "{"])
def test_a_run_whose_summary_is_damaged_does_not_count_as_finished(text, finished, corpus, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(text)
    said: list[str] = []
    with pytest.raises(BadInput, match=r"summary\.json.* is damaged: .*delete it and have it made again with"):
        train(settings(corpus, tmp_path / "run", {"resume": True}), said.append)
    assert not any("finished" in line for line in said)
    summary.unlink()
    train(settings(corpus, tmp_path / "run", {"resume": True}))
    kept = ("val", "val_windows", "load", "steps")
    again, before = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", finished))
    assert {key: again[key] for key in kept} == {key: before[key] for key in kept}


WRONG = {
    "a list": "[]",
    "nothing": "",
    "a word": "seed",
    "a misspelt setting": "sed: 1",
    "a word for a number": "seed: many",
    "no group": "model: 3",
    "a group of nothing": "optim:",
    "keys that are no words": "{1: 2, [3]: 4}",
    "an impossible pair": "source_state: all",
    "out of range": "optim: {lr: -1}",
    "nan": "optim: {lr: .nan}",
    "very deep": "[" * 5000,
    "a tag": "!!python/object/apply:os.getcwd []",
    "a date that is none": "seed: 2001-99-99",
    "no text": "\x00",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_config_that_is_wrong_is_refused_by_its_name(what, tmp_path):
    (tmp_path / "config.yaml").write_text(WRONG[what])
    with pytest.raises(BadInput) as refusal:
        read_config(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "config.yaml"))
    assert "\n" not in str(refusal.value)


def test_settings_in_a_checkpoint_that_are_wrong_are_refused_by_its_name(finished, tmp_path):
    path, meta = checkpoint.newest_meta(finished / "checkpoints")
    with pytest.raises(BadInput, match=rf"^{path}/meta\.json: config: seed='x' must be a whole number"):
        checkpoint.config_of(path, meta | {"config": {"seed": "x"}})
    with pytest.raises(BadInput, match=rf"^{path}/meta\.json: config: "):
        checkpoint.config_of(path, {})


def test_choices_deleted_while_a_run_trains_stop_it_with_a_sentence(corpus, tmp_path, monkeypatch):
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        if state.step == 4:
            (tmp_path / "run" / "routing" / "experts-1.npy").unlink()
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    with pytest.raises(BadInput, match=r"experts-1\.npy was deleted or replaced"):
        train(settings(corpus, tmp_path / "run", {"log.experts": True}))


def test_a_damaged_log_is_refused_on_resuming_and_left_as_it_was(interrupted, corpus, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:], ""]))
    before = files(tmp_path / "run")
    with pytest.raises(BadInput, match=r"metrics\.jsonl, line 3 is damaged"):
        train(settings(corpus, tmp_path / "run", {"resume": True}))
    assert files(tmp_path / "run") == before


def test_the_next_command_removes_what_killed_ones_left(interrupted, corpus, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    prepared = corpus / "cache" / "prepared" / ".building-abc"
    left = [left_by_others(path) for path in (tmp_path / "another-run", tmp_path / "run" / "summary.json", prepared)]
    for names in left:
        names["dead"].mkdir()
        names["live"].mkdir()
    train(settings(corpus, tmp_path / "run", {"resume": True}))
    assert [[names["dead"].exists(), names["live"].exists()] for names in left] == [[False, True]] * 3
    left[2]["live"].rmdir()


def test_a_folder_that_cannot_be_made_is_refused_and_leaves_nothing(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot be created"):
        train(settings(corpus, tmp_path / "file" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_is_created_whole_or_not_at_all(corpus, tmp_path, monkeypatch):
    cfg = settings(corpus, tmp_path / "run")

    def die(self, folder):
        (folder / "half").write_text("a tok")
        raise Killed

    monkeypatch.setattr(Tokenizer, "save", die)
    with pytest.raises(Killed):
        create_folder(tmp_path / "run", cfg, Tokenizer.load(prepared_folder(corpus)))
    assert list(tmp_path.iterdir()) == []


def prepared_folder(corpus: Path) -> Path:
    train_config = settings(corpus, "")
    return prepare(train_config.data, train_config.tokenizer, silent).folder


def test_a_runs_config_can_be_read_back_and_is_resolved(finished):
    cfg = read_config(finished)
    assert isinstance(cfg, Config)
    assert cfg.model.vocab_size == 257
    assert cfg.dispatch == "torch"
    assert to_dict(cfg) == yaml.safe_load((finished / "config.yaml").read_text())


def test_a_damaged_config_is_refused(finished, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(BadInput, match=r"config\.yaml is damaged"):
        read_config(tmp_path)


def test_a_folder_that_is_no_run_is_refused_with_the_runs_beside_it(finished):
    with pytest.raises(BadInput, match=f"no config.yaml; .*{finished}"):
        read_config(finished.parent / "rum")


def test_equal_settings_have_an_equal_folder_and_others_another(corpus):
    name = lambda changes: default_folder(settings(corpus, "", changes))
    assert name({}) == name({"log.every": 7}) == name({"data.workers": 2}) == name({"resume": True})
    assert len({name({}), name({"seed": 1}), name({"optim.lr": 1.0}), name({"model.moe": None})}) == 4


def test_a_finished_run_has_every_file(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if "checkpoints" not in str(path)}
    assert names == {
        "config.yaml", "tokenizer", "tokenizer/tokenizer.json", "tokenizer/ranks.tiktoken", "metrics.jsonl",
        "routing", "routing/counts.jsonl", "summary.json",
    }  # fmt: skip
