"""Claims about trackers: each gets every scalar of every line, and a missing one is refused before anything is made."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.errors import BadInput
from moe.run.jsonl import read_lines
from moe.run.summary import DomainScore, LayerMetrics, MetricsLine, Validation, read_metrics
from moe.train.trackers import flatten
from tests.small_runs import STEPS, settings, train, train_until


def board(folder) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars: tag -> step -> value, as its own reader gives them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{tag} has a step twice: {steps}"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def test_tensorboard_has_every_scalar_of_every_step(corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", {"log.tensorboard": True}))
    found = board(tmp_path / "run")
    for line in read_metrics(tmp_path / "run"):
        for key, value in flatten(line).items():
            assert found[key][line.step] == pytest.approx(value, rel=1e-6)
    assert {"loss", "lm_loss", "grad_norm", "lr", "layer0/max_vio", "layer1/dead", "val/loss", "val/chess/bpb"} <= set(
        found
    )


def test_a_resumed_run_has_no_step_twice(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"log.tensorboard": True})
    train_until(cfg, 6)
    cfg.resume = True
    train(cfg)
    found = board(tmp_path / "run")["lm_loss"]
    assert found == pytest.approx(
        {line["step"]: line["lm_loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")[1:]}
    )
    assert sorted(found) == list(range(1, STEPS + 1))


def test_a_line_is_flattened_to_numbers_by_name():
    line = MetricsLine(
        3, 9.0, loss=1.5, losses={"aux": 1.25},
        layers=[LayerMetrics(2, 0.5, 0.75, 3.0, 1, 0.0, 0.125, losses={"aux": 0.25})],
        val=Validation(2.0, 1.0, {"code": DomainScore(3.0, 2.0, 64)}),
    )  # fmt: skip
    assert flatten(line) == {
        "step": 3, "seconds": 9.0, "loss": 1.5, "aux": 1.25,
        "layer2/max_vio": 0.5, "layer2/load_entropy": 0.75, "layer2/effective_experts": 3.0, "layer2/dead": 1,
        "layer2/dropped": 0.0, "layer2/skipped": 0.125, "layer2/aux": 0.25,
        "val/loss": 2.0, "val/bpb": 1.0, "val/code/loss": 3.0, "val/code/bpb": 2.0,
    }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """(name) -> the calls that a stand-in for that package gets."""

    def install(name):
        calls = []
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in ("init", "log", "finish"):
            record = lambda *arguments, function=function, **keywords: calls.append((function, arguments, keywords))
            setattr(module, function, record)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_settings_then_every_line_then_the_end(name, fake, corpus, tmp_path):
    calls = fake(name)
    train(settings(corpus, tmp_path / "run", {f"log.{name}": "my-project"}))
    (first, _, keywords), *logged, last = calls
    assert first == "init"
    assert keywords["project"] == "my-project"
    assert keywords["name"] == "run"
    assert keywords["resume"] == "allow"
    assert keywords["config"]["model"]["vocab_size"] == 257
    assert last == ("finish", (), {})
    lines = read_metrics(tmp_path / "run")
    assert logged == [("log", (flatten(line),), {"step": line.step}) for line in lines]


def test_a_tracker_is_finished_when_a_run_is_stopped(fake, corpus, tmp_path):
    calls = fake("wandb")
    train_until(settings(corpus, tmp_path / "run", {"log.wandb": "my-project"}), 3)
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "mine"), ("trackio", "mine")])
def test_a_missing_tracker_is_refused_before_anything_is_made(name, value, corpus, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find_spec(module, *rest)
    )
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run", {f"log.{name}": value}))
    assert str(caught.value) == (
        f"log.{name}={value} needs the package {name}, which is not installed: pip install 'moe-switchyard[{name}]'."
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_tracker_nothing_is_written(corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", {"train.steps": 2}))
    assert not (tmp_path / "run" / "tensorboard").exists()
