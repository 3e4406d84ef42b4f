"""Claims about trackers: each gets every scalar of every line, and a missing one is refused before anything is made."""

import importlib.machinery
import importlib.util
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.analysis import heat_map
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
    assert {"loss", "lm_loss", "grad_norm", "lr", "val/loss", "val/chess/bpb"} <= set(found)
    assert {"routing/layer_00/max_vio", "routing/layer_01/dead"} <= set(found)


def pictures(folder) -> dict[int, np.ndarray]:
    """TensorBoard's heat maps: step -> pixels, as its own reader gives them."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["routing/load"]
    return {
        event.step: np.array(Image.open(io.BytesIO(event.encoded_image_string)))
        for event in events.Images("routing/load")
    }


def test_tensorboard_has_a_heat_map_of_every_step_whose_counts_are_kept(corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", {"log.tensorboard": True}))
    counts = {line["step"]: line["counts"] for line in read_lines(tmp_path / "run" / "routing" / "counts.jsonl")}
    found = pictures(tmp_path / "run")
    assert sorted(found) == sorted(counts) == [2, 4, 6]
    for step, count_LE in counts.items():
        size = found[step].shape[0] // 2
        assert found[step].shape == (2 * size, 4 * size, 3)
        # A pixel of every cell: redder than that of a fair share where an expert has more, bluer where it has less.
        pixel_LE3 = found[step][size // 2 :: size, size // 2 :: size].astype(int)
        redder_LE = pixel_LE3[..., 0] - pixel_LE3[..., 2] - (heat_map.EVEN[0] - heat_map.EVEN[2])
        more_LE = np.array(count_LE) - np.mean(count_LE, axis=1, keepdims=True)
        assert np.sign(redder_LE).tolist() == np.sign(more_LE).tolist()
        assert {-1, 1} <= set(np.sign(more_LE).ravel())


def test_a_dense_run_and_one_without_pillow_have_scalars_alone(corpus, tmp_path, monkeypatch):
    train(settings(corpus, tmp_path / "dense", {"log.tensorboard": True, "model.moe": None}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find_spec(name))
    train(settings(corpus, tmp_path / "without", {"log.tensorboard": True}))
    for name in ("dense", "without"):
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        assert events.Tags()["images"] == []
        assert "loss" in events.Tags()["scalars"]


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
        "routing/layer_02/max_vio": 0.5, "routing/layer_02/load_entropy": 0.75,
        "routing/layer_02/effective_experts": 3.0, "routing/layer_02/dead": 1, "routing/layer_02/dropped": 0.0,
        "routing/layer_02/skipped": 0.125, "routing/layer_02/aux": 0.25,
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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_keeps_images_gets_heat_maps(name, fake, corpus, tmp_path, monkeypatch):
    calls = fake(name)
    monkeypatch.setattr(sys.modules[name], "Image", lambda pixels, caption: (pixels, caption), raising=False)
    train(settings(corpus, tmp_path / "run", {f"log.{name}": "mine"}))
    logged = {keywords["step"]: arguments[0] for kind, arguments, keywords in calls if kind == "log"}
    assert [step for step, values in logged.items() if "routing/load" in values] == [2, 4, 6]
    pixels, caption = logged[2]["routing/load"]
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert "fair share" in caption


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
