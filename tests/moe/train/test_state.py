"""Claims about a training state: a run that was ended anywhere becomes, bit for bit, the run that was not."""

import dataclasses
import json
import random
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch

import moe.train.loop
import moe.train.state
import moe.train.step
from moe.config.run import Config
from moe.data import loader
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint, machine
from moe.run.checkpoint import Snapshot
from moe.run.folder import read_config
from moe.run.jsonl import read_lines
from moe.train.state import seed_everything
from tests.small_runs import STEPS, Killed, fate, files, noisy, settings, start, tensors_digest, train, train_until

BIAS = {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.01, "balance.aux": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train.precision": "bf16"},
    "two-workers": {"data.workers": 2},
    "selection-bias": BIAS,
    "accumulation": {"train.accumulate": 2},
    "activation-checkpointing": {"train.checkpoint_activations": True},
    "dense": {"model.moe": None},
    "muon": {"optim.name": "muon"},
    "all-at-once": BIAS
    | {"train.precision": "bf16", "data.workers": 2, "train.accumulate": 2, "train.checkpoint_activations": True},
}


@pytest.fixture(autouse=True)
def every_generator_is_used(monkeypatch):
    noisy(monkeypatch)


def resumed(cfg: Config) -> Config:
    cfg.resume = True
    return cfg


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(changes, corpus, tmp_path):
    whole, killed = (settings(corpus, tmp_path / name, changes) for name in ("whole", "killed"))
    train(whole)
    train_until(killed, 6)
    assert read_lines(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 5, "steps were taken after the checkpoint"
    train(resumed(killed))
    assert fate(tmp_path / "killed") == fate(tmp_path / "whole")


def test_the_number_of_loader_processes_may_change_on_resuming(whole, corpus, tmp_path):
    killed = settings(corpus, tmp_path / "killed")
    train_until(killed, 5)
    killed.data.workers = 2
    train(resumed(killed))
    assert fate(tmp_path / "killed") == fate(whole)


@pytest.mark.parametrize("ends", [[1], [2, 5, 7], [4, 4, 4]], ids=str)
def test_a_run_may_be_killed_any_number_of_times(ends, whole, corpus, tmp_path):
    """Before the first checkpoint, after each, and again and again without getting further."""
    killed = settings(corpus, tmp_path / "killed")
    for step in ends:
        train_until(resumed(killed), step)
    train(killed)
    assert fate(tmp_path / "killed") == fate(whole)


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_only_writes_the_summary(whole, corpus, tmp_path):
    killed = settings(corpus, tmp_path / "killed")

    def die(*arguments):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe.train.loop, "summarize", die)
        with pytest.raises(Killed):
            train(killed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe.train.loop, "take_step", die)
        train(resumed(killed))
    assert fate(tmp_path / "killed") == fate(whole)


def test_a_process_killed_by_the_system_resumes_bitwise(whole, corpus, tmp_path):
    killed = settings(corpus, tmp_path / "killed")
    process, _ = start(killed, "between steps", tmp_path / "log")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000003"]
    train(resumed(killed))
    assert fate(tmp_path / "killed") == fate(whole)


# Dropping a state

DROP: dict[str, Any] = {}  # what is not restored -> (settings, snapshot) -> the snapshot without it


def drop(what):
    return lambda function: DROP.setdefault(what, function)


@drop("nothing")
def nothing(cfg, snapshot):
    return snapshot


@drop("parameters")
def parameters(cfg, snapshot):
    fresh = dict(Transformer(cfg.model, cfg.router).initialize(cfg.seed).named_parameters())
    kept = {name: value for name, value in snapshot.model.items() if name not in fresh}
    return dataclasses.replace(snapshot, model={n: fresh.get(n, kept.get(n)).detach() for n in snapshot.model})


@drop("one norm")
def one_norm(cfg, snapshot):
    return dataclasses.replace(
        snapshot, model=snapshot.model | {"norm.weight": torch.ones_like(snapshot.model["norm.weight"])}
    )


@drop("selection bias")
def selection_bias(cfg, snapshot):
    biases = {name: torch.zeros_like(value) for name, value in snapshot.model.items() if name.endswith("bias_E")}
    assert len(biases) == 2
    return dataclasses.replace(snapshot, model=snapshot.model | biases)


def zero(kind, snapshot):
    state = {k: torch.zeros_like(v) if k.startswith(f"{kind}/") else v for k, v in snapshot.optimizer.items()}
    return dataclasses.replace(snapshot, optimizer=state)


@drop("exp_avg")
def exp_avg(cfg, snapshot):
    return zero("exp_avg", snapshot)


@drop("exp_avg_sq")
def exp_avg_sq(cfg, snapshot):
    return zero("exp_avg_sq", snapshot)


@drop("Adam's step")
def adam_step(cfg, snapshot):
    return zero("step", snapshot)


@drop("step")
def step(cfg, snapshot):
    return dataclasses.replace(snapshot, step=0)


@drop("torch's generator")
def torch_generator(cfg, snapshot):
    return dataclasses.replace(snapshot, rng={"cpu": torch.Generator().manual_seed(cfg.seed).get_state()})


@drop("Python's generator")
def python_generator(cfg, snapshot):
    version, words, gauss = random.Random(cfg.seed).getstate()
    rng = snapshot.meta["rng"] | {"python": [version, list(words), gauss]}
    return dataclasses.replace(snapshot, meta=snapshot.meta | {"rng": rng})


@drop("NumPy's generator")
def numpy_generator(cfg, snapshot):
    state = np.random.RandomState(cfg.seed).get_state(legacy=False)
    return dataclasses.replace(snapshot, meta=snapshot.meta | {"rng": snapshot.meta["rng"] | {"numpy": state}})


@drop("skipped steps")
def skipped_steps(cfg, snapshot):
    return dataclasses.replace(snapshot, meta=snapshot.meta | {"skipped": 0})


@drop("loader's position")
def loader_position(cfg, snapshot):
    iterate = loader.Loader.iterate
    loader.Loader.iterate = lambda self, from_step: iterate(self, 0)  # undone by the fixture below
    return snapshot


@pytest.fixture(scope="module")
def uninterrupted_and_killed(corpus, tmp_path_factory):
    """A run with a selection bias that skips step 2, whole, and the same killed after its checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("drop")
    with pytest.MonkeyPatch.context() as patch:
        noisy(patch)
        skip_step(patch, 2)
        for name in ("whole", "killed"):
            cfg = settings(corpus, folder / name, BIAS | {"train.non_finite": "skip"})
            train(cfg) if name == "whole" else train_until(cfg, 5)
    return folder / "whole", folder / "killed", cfg


def skip_step(patch, *steps):
    """Give these steps a gradient norm that is not finite."""
    take_step, compute_gradients = moe.train.step.take_step, moe.train.step.compute_gradients

    def take(state, *arguments):
        def compute(*inner):
            gradients = compute_gradients(*inner)
            gradients.norm = float("inf") if state.step + 1 in steps else gradients.norm
            return gradients

        with pytest.MonkeyPatch.context() as inner_patch:
            inner_patch.setattr(moe.train.step, "compute_gradients", compute)
            return take_step(state, *arguments)

    patch.setattr(moe.train.loop, "take_step", take)


@pytest.mark.parametrize("what", DROP)
def test_a_resume_that_drops_any_state_is_noticed(what, uninterrupted_and_killed, tmp_path, monkeypatch):
    whole, killed, cfg = uninterrupted_and_killed
    cfg = resumed(dataclasses.replace(cfg, run=str(tmp_path / "killed")))
    shutil.copytree(killed, tmp_path / "killed")
    load = checkpoint.load
    resolved = read_config(killed)
    monkeypatch.setattr(loader.Loader, "iterate", loader.Loader.iterate)  # put back afterwards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: DROP[what](resolved, load(path)))
        train(cfg)
    same = fate(tmp_path / "killed") == fate(whole)
    assert same == (what == "nothing")


def test_skipped_steps_in_a_row_are_counted_across_a_resume(corpus, tmp_path, monkeypatch):
    """With 4 allowed in a row, steps 2 to 6 are one too many, wherever the run was interrupted."""
    monkeypatch.setattr(moe.train.step, "MAX_SKIPPED", 4)
    skip_step(monkeypatch, *range(2, 8))
    cfg = settings(corpus, tmp_path / "run", {"train.non_finite": "skip"})
    train_until(cfg, 5)
    with pytest.raises(BadInput, match=r"^step 6: "):
        train(resumed(cfg))


def test_a_checkpoint_holds_everything_that_changes(corpus, tmp_path):
    """Every attribute of the training state is in the snapshot, so that a new one cannot be forgotten, but for what a
    step only reads, which stays as it is, and what saves it."""
    cfg = settings(corpus, tmp_path / "run")
    train(cfg)
    snapshot = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", print))
    fields = {each.name for each in dataclasses.fields(moe.train.state.State)}
    assert fields - {"teacher", "replay", "companions", "saver"} == {
        "model", "optimizer", "loader", "step", "seconds", "skipped", "skipped_in_a_row", "average",
    }  # fmt: skip
    assert isinstance(snapshot, Snapshot)
    assert snapshot.step == STEPS
    assert {key.split("/")[0] for key in snapshot.optimizer} == {"exp_avg", "exp_avg_sq", "step"}
    assert {"loader", "rng", "seconds", "skipped", "skipped_in_a_row", "config"} <= set(snapshot.meta)


def test_resuming_after_a_damaged_checkpoint_goes_on_from_the_one_before(corpus, tmp_path):
    whole, killed = (settings(corpus, tmp_path / name, {"checkpoint.every": 2}) for name in ("whole", "killed"))
    train(whole)
    train_until(killed, 6)
    bad = tmp_path / "killed" / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    said = []
    train(resumed(killed), said.append)
    assert any(str(bad) in line and "step-00000002" in line for line in said)
    ours, theirs = fate(tmp_path / "killed"), fate(tmp_path / "whole")
    assert ours == theirs


def test_other_threads_or_versions_on_resuming_are_warned_of(corpus, tmp_path, monkeypatch):
    cfg = settings(corpus, tmp_path / "run")
    train_until(cfg, 5)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "another"})
    said = []
    train(resumed(cfg), said.append)
    assert any(line.startswith("warning: versions was") and "another" in line for line in said)


def test_the_log_has_one_line_per_step_after_any_number_of_resumes(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run")
    for step in (5, 6):
        train_until(resumed(cfg), step)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "los')  # as a crash leaves it
    train(cfg)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))


def test_tensors_digest_sees_a_single_bit():
    value = torch.tensor([1.0, 2.0])
    other = value.clone()
    other.view(torch.int32)[1] ^= 1
    assert tensors_digest({"a": value}) != tensors_digest({"a": other})


def test_every_global_generator_is_seeded():
    drawn = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


# A run that starts from another


@pytest.fixture(scope="module")
def stable(corpus, tmp_path_factory):
    """A finished run at a constant rate, every checkpoint of which is kept."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    with pytest.MonkeyPatch.context() as patch:
        noisy(patch)
        train(settings(corpus, folder, {"optim.schedule": "constant", "checkpoint.every": 1, "checkpoint.keep": 9}))
    return folder


DECAY = {"optim.schedule": "wsd", "optim.decay": 3 / STEPS, "optim.final": 0.0}  # the last three steps


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "killed before its first checkpoint"])
def test_a_decay_from_a_step_of_a_stable_run_is_the_run_that_decayed_there(killed, stable, corpus, tmp_path):
    train(settings(corpus, tmp_path / "whole", DECAY))
    before, said = files(stable), []
    cfg = settings(
        corpus, tmp_path / "new", DECAY | {"source": f"{stable}/checkpoints/step-00000004", "source_state": "all"}
    )
    if killed:
        train_until(cfg, 6)
        cfg.resume = True
    train(cfg, said.append)
    ours, theirs = fate(tmp_path / "new"), fate(tmp_path / "whole")
    assert [line["step"] for line in ours["lines"]] == [4, 5, 6, 7], "the first is a validation of the source"
    for key in ("step", "model", "rng", "exp_avg", "exp_avg_sq", "summary", "loader"):
        assert ours[key] == theirs[key], key
    assert not any("warning" in line for line in said)
    assert files(stable) == before


def test_a_new_run_from_anothers_weights_begins_at_step_0_with_nothing_else_of_it(
    stable, corpus, tmp_path, monkeypatch
):
    cfg = settings(corpus, tmp_path / "new", {"source": str(stable), "train.batch_size": 2, "train.steps": 2})
    began = []
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        began.append((state.step, model_digest(state.model), len(state.optimizer.state)))
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    train(cfg)
    newest = stable / "checkpoints" / f"step-{STEPS:08d}"
    assert began[0] == (0, tensors_digest(checkpoint.load(newest).model), 0)
    assert read_config(tmp_path / "new").source == str(newest), "what it began from is written down"
    train(resumed(cfg))  # finished: the source as it was given is the run's own


def model_digest(model):
    return tensors_digest(model_tensors(model))


UNFIT = {
    "nothing there": ({"source": "/nowhere"}, "source=/nowhere is neither a run's folder nor a checkpoint"),
    "another model": ({"model.d_model": 16}, "does not fit this run: "),
    "another tokenizer": ({"tokenizer.name": "char"}, "was trained with another tokenizer"),
    "other data for all": (
        {"source_state": "all", "train.batch_size": 2, "train.steps": 9},
        "train.batch_size changed",
    ),
    "another optimiser for all": (
        {"source_state": "all", "train.steps": 9, "optim.name": "muon"},
        "optim.name=muon cannot go on with the state of source=",
    ),
    "no step left": ({"source_state": "all"}, f"train.steps={STEPS} is not above the step {STEPS}"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_source_that_does_not_fit_is_refused_and_leaves_no_folder(what, stable, corpus, tmp_path):
    changes, message = UNFIT[what]
    before = files(stable)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "new", {"source": str(stable)} | changes))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert files(stable) == before


def test_a_jump_of_the_learning_rate_is_said(stable, corpus, tmp_path):
    said = []
    changes = {"source": str(stable), "source_state": "all", "train.steps": STEPS + 1, "optim.schedule": "cosine"}
    train(settings(corpus, tmp_path / "new", changes), said.append)
    assert any(line.startswith(f"warning: the learning rate was 0.002 at step {STEPS}, and in this") for line in said)
    assert read_lines(tmp_path / "new" / "metrics.jsonl")[-1]["step"] == STEPS + 1
