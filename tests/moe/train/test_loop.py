"""Claims about the training loop: its variants, and what it writes down."""

import dataclasses
import itertools
import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch

import moe.train.loop
import moe.train.step
from moe.config.parse import to_dict
from moe.config.run import build
from moe.data import loader
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.model import cost
from moe.model.transformer import Transformer
from moe.run import checkpoint
from moe.run.folder import read_config
from moe.run.jsonl import read_lines
from moe.run.load import load_run
from moe.run.summary import read_metrics, read_summary
from moe.train.optimizer import learning_rate
from tests.small_runs import EVALUATED, STEPS, TIMINGS, fate, settings, silent, tensors_digest, train

DENSE = {"model.moe": None}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(folder, summary, lines said) of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    said: list[str] = []
    summary = train(settings(corpus, folder), said.append)
    return folder, summary, said


def lines_of(corpus, folder, changes: dict[str, Any]):
    """A run's metrics lines."""
    train(settings(corpus, folder, changes))
    return read_lines(folder / "metrics.jsonl")


def test_activation_checkpointing_changes_no_bit(finished, corpus, tmp_path):
    folder, _, _ = finished
    train(settings(corpus, tmp_path / "run", {"train.checkpoint_activations": True}))
    assert fate(tmp_path / "run") == fate(folder)


def test_a_repeated_run_is_the_same_to_the_bit_and_another_seed_is_not(finished, corpus, tmp_path):
    folder, _, _ = finished
    train(settings(corpus, tmp_path / "again"))
    assert fate(tmp_path / "again") == fate(folder)
    train(settings(corpus, tmp_path / "other", {"seed": 1}))
    assert fate(tmp_path / "other")["model"] != fate(folder)["model"]


def test_a_compiled_run_learns_what_an_eager_one_does(finished, corpus, tmp_path, monkeypatch):
    """The model is traced for real; the compiler behind it, minutes of work on this machine, is not of interest."""
    compile_module = Transformer.compile
    monkeypatch.setattr(Transformer, "compile", lambda self: compile_module(self, backend="eager"))
    compiled = lines_of(
        corpus, tmp_path / "run", {"train.compile": True, "train.steps": 2, "optim.schedule": "constant"}
    )
    eager = lines_of(corpus, tmp_path / "eager", {"train.steps": 2, "optim.schedule": "constant"})
    assert [line["lm_loss"] for line in compiled[1:]] == pytest.approx(
        [line["lm_loss"] for line in eager[1:]], rel=1e-4
    )
    names = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", silent)).model.keys()
    assert names == checkpoint.load(checkpoint.latest(finished[0] / "checkpoints", silent)).model.keys()


def test_bf16_is_autocast_over_fp32_weights(corpus, tmp_path):
    found = {}
    for precision in ("bf16", "fp32"):
        found[precision] = lines_of(corpus, tmp_path / precision, {"train.precision": precision})
    losses = [[line["lm_loss"] for line in found[each][1:]] for each in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    snapshot = checkpoint.load(checkpoint.latest(tmp_path / "bf16" / "checkpoints", silent))
    assert {value.dtype for value in (*snapshot.model.values(), *snapshot.optimizer.values())} == {torch.float32}


LONG = {"model.context": 128, "model.init_std": 0.3, "train.steps": 2, "train.eval_tokens": 10**6}


@pytest.fixture(scope="module")
def documents(corpus, tmp_path_factory):
    """{packed or separate: the folder of a run whose windows have several documents, and its summary}."""
    root = tmp_path_factory.mktemp("documents")
    changes = LONG | {"train.accumulate": 2, "train.checkpoint_activations": True}
    names = ("packed", "separate")
    return {
        name: (root / name, train(settings(corpus, root / name, changes | {"data.documents": name}))) for name in names
    }


def test_a_run_of_separate_documents_is_validated_on_each_by_itself(documents):
    folder, summary = documents["separate"]
    assert summary.dataset == documents["packed"][1].dataset  # the same windows
    cfg, eot = read_config(folder), load_run(folder)[1].eot
    split = prepare(cfg.data, cfg.tokenizer, silent).split("val")
    starts = loader.validation_windows(split, cfg.model.context, cfg.train.eval_tokens).start_W
    windows = torch.from_numpy(split.read(starts, cfg.model.context)[0])
    model = load_run(folder, "last")[0].double()
    assert model.document_end == eot
    model.document_end = None
    nats, n_documents = [], 0
    for window in windows:
        ends = (window[:-1] == eot).nonzero().flatten().tolist()
        bounds = sorted({0, *(end + 1 for end in ends), len(window) - 1})
        n_documents += len(bounds) - 1
        for start, end in itertools.pairwise(bounds):
            log_prob_1SV = model(window[None, start:end]).logits_BSV.log_softmax(-1)
            nats += [-log_prob_1SV[0, i, window[start + i + 1]].item() for i in range(end - start)]
    assert n_documents > len(windows)
    assert summary.val.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)


def test_documents_are_kept_apart_in_training_too_and_to_the_end_of_a_run(documents, corpus):
    losses = [read_lines(folder / "metrics.jsonl")[1]["lm_loss"] for folder, _ in documents.values()]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)  # of the same weights and the same tokens
    with pytest.raises(BadInput, match=r"data\.documents"):
        train(
            settings(
                corpus,
                documents["separate"][0],
                LONG | {"train.accumulate": 2, "resume": True, "data.documents": "packed"},
            )
        )


def test_training_learns(corpus, tmp_path):
    """Words of a domain have letters that the others do not: far below the initial ln 257 in few steps."""
    lines = lines_of(corpus, tmp_path / "run", {"train.steps": 40, "optim.lr": 0.01, "train.eval_every": 0})
    assert lines[0]["val"]["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert lines[-1]["val"]["loss"] < 3.2


# What a run writes down


def test_metrics_have_one_line_per_step_with_every_field(finished):
    lines = read_lines(finished[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines[1:]:
        assert line.keys() - {"val"} == {
            "step", "loss", "lm_loss", "aux", "z", "grad_norm", "lr", "tokens_per_s", "seconds", "skipped", "layers",
        }  # fmt: skip
        assert [each["layer"] for each in line["layers"]] == [0, 1]
        for each in line["layers"]:
            assert each.keys() == {
                    "layer", "max_vio", "load_entropy", "effective_experts", "dead", "dropped", "skipped", "rows",
                    "losses", "starved", *(["entropy", "weakest"] if line["step"] % 2 == 0 else []),
                }  # fmt: skip
            assert each["dropped"] == 0
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.01 * line["aux"] + 0.001 * line["z"], rel=1e-12)
        assert line["tokens_per_s"] > 0


def test_validations_are_at_the_start_at_the_end_and_every_so_often(finished):
    lines = read_lines(finished[0] / "metrics.jsonl")
    assert [line["step"] for line in lines if "val" in line] == [0, *range(EVALUATED, STEPS, EVALUATED), STEPS]
    for line in lines:
        if "val" in line:
            assert line["val"].keys() == {"loss", "bpb", "domains"}
            assert set(line["val"]["domains"]) == {"algebra", "botany", "chess"}


def test_the_rates_that_were_used_are_the_schedules(finished, corpus):
    cfg = settings(corpus, "")
    lines = read_lines(finished[0] / "metrics.jsonl")
    assert [line["lr"] for line in lines[1:]] == [learning_rate(cfg.optim, step, STEPS) for step in range(1, STEPS + 1)]


def test_routing_counts_are_kept_over_time(finished):
    counts = read_lines(finished[0] / "routing" / "counts.jsonl")
    assert [line["step"] for line in counts] == [2, 4, 6]  # log.every=2
    lines = {line["step"]: line for line in read_lines(finished[0] / "metrics.jsonl")}
    for line in counts:
        assert [len(layer) for layer in line["counts"]] == [4, 4]
        for layer, count in enumerate(line["counts"]):
            assert sum(count) == 4 * 32 * 2
            expected = max(count) / (sum(count) / 4) - 1
            assert lines[line["step"]]["layers"][layer]["max_vio"] == pytest.approx(expected)


def test_a_dense_run_has_no_routing(corpus, tmp_path):
    lines = lines_of(corpus, tmp_path / "run", DENSE)
    assert all(line["layers"] == [] and line["aux"] == 0 and line["loss"] == line["lm_loss"] for line in lines[1:])
    assert read_lines(tmp_path / "run" / "routing" / "counts.jsonl") == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["load"] is None


def test_only_the_layers_with_experts_are_measured(corpus, tmp_path):
    lines = lines_of(corpus, tmp_path / "run", {"model.moe.first_dense": 1, "train.steps": 2})
    assert [[each["layer"] for each in line["layers"]] for line in lines[1:]] == [[1], [1]]


def test_what_a_router_of_no_fixed_number_took_is_measured_and_costed(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"router.name": "threshold", "train.steps": 3})
    summary = train(cfg)
    counts = [line["counts"] for line in read_lines(tmp_path / "run" / "routing" / "counts.jsonl")]
    lines = read_metrics(tmp_path / "run")
    assert [layer.rows for layer in lines[2].layers] == [sum(count) / 128 for count in counts[0]]  # log.every=2
    assert summary.rows == pytest.approx(sum(layer.rows for line in lines[1:] for layer in line.layers) / 6)
    model = read_config(tmp_path / "run").model
    assert summary.flops == cost.flops(model, cfg.router, rows=summary.rows)
    assert all(0 < layer.rows <= 4 for layer in summary.load.routing)


def test_a_summary_leads_back_to_its_run(finished):
    folder, summary, _ = finished
    assert summary == read_summary(folder)
    assert json.loads((folder / "summary.json").read_text()).keys() == {
        "name", "seed", "model", "params", "flops", "steps", "tokens", "seconds", "tokens_per_s", "peak_memory_bytes",
        "val", "val_windows", "load", "dataset", "tokenizer", "precision", "dispatch", "device", "threads", "versions",
        "commit", "dirty", "skipped", "schema", "seed_init", "seed_data", "rows",
    }  # fmt: skip
    lines = read_lines(folder / "metrics.jsonl")
    assert dataclasses.asdict(summary.val) == lines[-1]["val"]
    assert summary.steps == STEPS
    assert summary.tokens == STEPS * 4 * 32
    assert summary.seconds == lines[-1]["seconds"]
    assert summary.tokens_per_s == pytest.approx(summary.tokens / summary.seconds)
    assert summary.threads == 1
    snapshot = checkpoint.load(checkpoint.latest(folder / "checkpoints", silent))
    assert summary.params.total == sum(t.numel() for t in snapshot.model.values())
    assert build(snapshot.meta["config"]).seed == summary.seed


def test_the_newest_checkpoints_and_the_best_are_kept(corpus, tmp_path):
    """With a rate that destroys what was learned, the best is not among the newest."""
    lines = lines_of(
        corpus, tmp_path / "run", {"checkpoint.every": 1, "train.eval_every": 1, "optim.lr": 5.0, "checkpoint.keep": 2}
    )
    root = tmp_path / "run" / "checkpoints"
    best = min(lines[1:], key=lambda line: line["val"]["loss"])["step"]
    assert sorted(int(path.name[5:]) for path in root.iterdir()) == sorted({best, STEPS - 1, STEPS})
    assert checkpoint.best(root).name == f"step-{best:08d}"


def test_without_intermediate_checkpoints_and_evaluations_the_last_ones_are_made(corpus, tmp_path):
    lines = lines_of(corpus, tmp_path / "run", {"checkpoint.every": 0, "train.eval_every": 0})
    assert [line["step"] for line in lines if "val" in line] == [0, STEPS]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


def test_the_beginning_and_the_end_are_said(finished):
    folder, summary, said = finished
    assert any(line.startswith(f"run: {folder}  {summary.params.total:,} parameters") for line in said)
    assert said[-1].startswith(f"run: {folder} is finished  val loss {summary.val.loss:.4f}")


def test_training_leaves_the_callers_config_alone(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run", {"train.steps": 2})
    before = to_dict(cfg)
    train(cfg)
    assert to_dict(cfg) == before


def test_models_compared_see_the_same_batches(corpus, tmp_path, monkeypatch):
    """Whatever the model, a step's batch is a function of (seed, step)."""
    seen: list[list[str]] = []
    take_step = moe.train.step.take_step

    def take(state, batch, *arguments):
        seen[-1].append(tensors_digest({"tokens": batch.tokens_BS, "targets": batch.targets_BS}))
        return take_step(state, batch, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    for name, changes in {"moe": {}, "dense": DENSE}.items():
        seen.append([])
        train(settings(corpus, tmp_path / name, changes))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == STEPS


def test_the_seeds_of_weights_and_of_batches_are_two_sources_of_variation(corpus, tmp_path, monkeypatch):
    """Each alone changes what it is of and leaves the other as it was; a seed of -1 is `seed`."""
    seen: dict[str, tuple[str, list[str]]] = {}
    take_step = moe.train.step.take_step

    def take(state, batch, *arguments):
        _, batches = seen.setdefault(name, (tensors_digest(dict(state.model.named_parameters())), []))
        batches.append(tensors_digest({"tokens": batch.tokens_BS}))
        return take_step(state, batch, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    for name, changes in {
        "both 0": {},
        "weights 1": {"seed_init": 1},
        "batches 1": {"seed_data": 1},
        "both 1": {"seed": 1},
        "seed 7, 0 and 1": {"seed": 7, "seed_init": 0, "seed_data": 1},
    }.items():
        summary = train(settings(corpus, tmp_path / name, changes | {"train.steps": 2, "train.eval_every": 0}))
        expected = changes.get("seed", 0)
        assert summary.seed == expected
        assert summary.seed_init == changes.get("seed_init", expected)
        assert summary.seed_data == changes.get("seed_data", expected)
    weights, batches = [{name: drawn[i] for name, drawn in seen.items()} for i in (0, 1)]
    assert weights["both 0"] == weights["batches 1"] == weights["seed 7, 0 and 1"]
    assert weights["both 1"] == weights["weights 1"] != weights["both 0"]
    assert batches["both 0"] == batches["weights 1"]
    assert batches["both 1"] == batches["batches 1"] == batches["seed 7, 0 and 1"] != batches["both 0"]


def test_timings_are_all_that_two_equal_runs_differ_in(finished):
    """What `fate` leaves out of a line is exactly the timings."""
    line = read_lines(finished[0] / "metrics.jsonl")[1]
    assert set(line) - set(fate(finished[0])["lines"][1]) == set(TIMINGS)


def test_a_loader_is_closed_when_a_step_fails(corpus, tmp_path, monkeypatch):
    closed = []
    iterate = loader.Loader.iterate

    def watched(self, from_step):
        try:
            yield from iterate(self, from_step)
        finally:
            closed.append(from_step)

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(loader.Loader, "iterate", watched)
    monkeypatch.setattr(moe.train.loop, "take_step", fail)
    with pytest.raises(ZeroDivisionError):
        train(settings(corpus, tmp_path / "run"))
    assert closed == [0]


def test_every_backend_trains_the_same_model(corpus, tmp_path):
    changes = {"train.steps": 2, "train.eval_every": 2, "optim.warmup": 0, "log.every": 1}
    changes |= {"model.context": 8, "train.batch_size": 2, "train.eval_tokens": 16}  # interpreted, triton is slow
    losses = {}
    for backend in ("reference", "torch", "triton"):
        train(settings(corpus, tmp_path / backend, changes | {"dispatch": backend}))
        losses[backend] = [line["loss"] for line in read_lines(tmp_path / backend / "metrics.jsonl") if "loss" in line]
    assert losses["reference"][0] != losses["reference"][-1]
    for backend in ("torch", "triton"):
        np.testing.assert_allclose(losses[backend], losses["reference"], rtol=1e-5)


@pytest.mark.parametrize(("dispatch", "moe", "said"), [("auto", {}, 1), ("torch", {}, 0), ("auto", None, 0)])
def test_auto_says_once_which_backend_it_took_and_why(corpus, tmp_path, dispatch, moe, said):
    lines = []
    changes = {"train.steps": 2, "optim.warmup": 0, "dispatch": dispatch} | ({"model.moe": None} if moe is None else {})
    train(settings(corpus, tmp_path / "run", changes), lines.append)
    found = [line for line in lines if line.startswith("dispatch: torch, because ")]
    assert len(found) == said


def test_a_clock_that_stands_still_gives_no_speed_and_ends_no_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    summary = train(settings(corpus, tmp_path / "run"))
    assert summary.seconds == 0
    assert math.isnan(summary.tokens_per_s)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["tokens_per_s"] for line in lines[1:]] == [None] * STEPS
