"""Small real training runs, shared by the tests of the training loop and the command line."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import moe.train.loop
import moe.train.state
import moe.train.step
from moe.config.run import Config, build
from moe.data import owner
from moe.run import checkpoint, machine
from moe.run.jsonl import read_lines

TIMINGS = ("seconds", "tokens_per_s")
STEPS, SAVED, EVALUATED = 7, 3, 2  # a run's steps; steps between checkpoints and between evaluations


def silent(line: str) -> None:
    pass


def write_texts(folder: Path) -> None:
    """60 documents in three domains, of words that no two domains share."""
    rng = random.Random(0)
    for domain, letters in (("algebra", "abcdefg"), ("botany", "hijklmn"), ("chess", "opqrstué")):
        words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(200)]
        for i in range(20):
            path = folder / domain / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(rng.choices(words, k=rng.randint(200, 800))))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts`, and `cache` for what is prepared from them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder / "texts")
    return folder


def overrides(corpus: Path, run: Path | str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Dotted settings of a run of a second, of a model with two MoE layers; None leaves out those below."""
    own = {
        "run": str(run),
        "data.name": "text",
        "data.path": str(corpus / "texts"),
        "data.cache": str(corpus / "cache"),
        "data.val_fraction": 0.15,
        "tokenizer.name": "byte",
        "model.context": 32,
        "model.n_layers": 2,
        "model.d_model": 32,
        "model.n_heads": 2,
        "model.d_ff": 48,
        "model.moe.n_experts": 4,
        "model.moe.k": 2,
        "model.moe.d_expert": 16,
        "optim.warmup": 2,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.threads": 1,
        "train.precision": "fp32",
        "train.device": "cpu",
        "train.eval_every": EVALUATED,
        "train.eval_tokens": 256,
        "checkpoint.every": SAVED,
        "log.every": 2,
    }
    changes = changes or {}
    without = tuple(f"{key}." for key, value in changes.items() if value is None)
    return {key: value for key, value in own.items() if not key.startswith(without)} | changes


def settings(corpus: Path, run: Path | str, changes: dict[str, Any] | None = None) -> Config:
    """The validated config of `overrides`."""
    tree: dict[str, Any] = {}
    for key, value in overrides(corpus, run, changes).items():
        *groups, name = key.split(".")
        group = tree
        for each in groups:
            group = group.setdefault(each, {})
        group[name] = value
    return build(tree)


def train(cfg: Config, say: Callable[[str], None] = silent) -> dict[str, Any]:
    """`moe.train.loop.train` without what only costs time here: no power fails, and nobody reads the peak memory."""
    with mock.patch.object(machine, "reset_peak_memory"), mock.patch("os.fsync"):
        return moe.train.loop.train(cfg, say)


class Killed(BaseException):
    """Ends a run like a kill: nothing that handles errors handles it."""


def train_until(cfg: Config, step: int) -> None:
    """Train, and be killed at the beginning of `step`."""
    take_step = moe.train.loop.take_step

    def take(state: moe.train.state.State, *arguments: Any) -> Any:
        if state.step + 1 == step:
            raise Killed
        return take_step(state, *arguments)

    with mock.patch.object(moe.train.loop, "take_step", take), pytest.raises(Killed):
        train(cfg)


def noisy(monkeypatch: Any) -> None:
    """Make training draw from every global generator, as dropout or a library might: gradients get noise."""
    compute_gradients = moe.train.step.compute_gradients

    def compute(model: torch.nn.Module, *arguments: Any) -> moe.train.step.Gradients:
        gradients = compute_gradients(model, *arguments)
        for p in model.parameters():
            p.grad += 1e-3 * torch.randn_like(p) + 1e-4 * (random.random() + np.random.random())  # noqa: NPY002
        return gradients

    monkeypatch.setattr(moe.train.step, "compute_gradients", compute)


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fate(run: Path) -> dict[str, Any]:
    """All that a run came to, but timings: the newest checkpoint, part by part, and the lines of its logs."""
    path = checkpoint.latest(run / "checkpoints", silent)
    assert path is not None, f"no checkpoint in {run}"
    snapshot = checkpoint.load(path)
    kinds = {key.split("/")[0] for key in snapshot.optimizer}
    meta = {key: value for key, value in snapshot.meta.items() if key not in ("seconds", "config")}
    lines = read_lines(run / "metrics.jsonl")
    found = {
        "step": snapshot.step,
        "model": tensors_digest(snapshot.model),
        "rng": tensors_digest(snapshot.rng),
        "lines": [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines],
        "counts": read_lines(run / "routing" / "counts.jsonl"),
    }
    for kind in sorted(kinds):
        found[kind] = tensors_digest({key: t for key, t in snapshot.optimizer.items() if key.startswith(f"{kind}/")})
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        found["summary"] = {key: summary[key] for key in ("steps", "skipped", "val", "val_windows", "load", "dataset")}
    return found | meta


def left_by_others(path: Path) -> dict[str, Path]:
    """Names of half-written files beside `path`: of a dead process, of this one, of another that lives, of one whose
    number was given again, of one on another machine."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    dead = dataclasses.replace(owner.this_process(), pid=pid)
    os.waitpid(pid, 0)
    ours = owner.this_process()
    owners = {
        "dead": dead,
        "ours": ours,
        "live": owner.Owner(ours.place, os.getppid(), owner._began(os.getppid())),
        "again": dataclasses.replace(ours, start=ours.start - 1),
        "elsewhere": dataclasses.replace(ours, place="0123abcd"),
    }
    return {who: path.with_name(f"{path.name}.tmp-{by.place}-{by.pid}-{by.start}") for who, by in owners.items()}


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file below `folder`, but for its lock."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("lock-")
    }


def start(cfg: Config, phase: str, log: Path) -> tuple[BaseProcess, Connection]:
    """A process that trains `cfg`, has reached `phase` and waits there, and a pipe: a word over it lets it go on."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["moe.train.loop"])
    here, there = context.Pipe()
    process = context.Process(target=child, args=(cfg, phase, log, there))
    process.start()
    there.close()
    try:
        assert here.recv() == phase
    except EOFError:
        pytest.fail(log.read_text() if log.exists() else "the process did not start")
    return process, here


def child(cfg: Config, phase: str, log: Path, pipe: Connection) -> None:
    """What that process does."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    monkeypatch = pytest.MonkeyPatch()
    noisy(monkeypatch)

    def halt() -> None:
        pipe.send(phase)
        pipe.recv()

    take_step, evaluate, write = moe.train.loop.take_step, moe.train.loop.evaluate, checkpoint._write
    compute_gradients, evaluations = moe.train.step.compute_gradients, iter(range(100))

    def stepping(state: moe.train.state.State, *arguments: Any) -> Any:
        if phase == "between steps" and state.step + 1 == 5:
            halt()

        def compute(*inner: Any) -> Any:
            gradients = compute_gradients(*inner)
            if phase == "step" and state.step + 1 == 5:
                halt()
            return gradients

        with mock.patch.object(moe.train.step, "compute_gradients", compute):
            return take_step(state, *arguments)

    def evaluating(*arguments: Any, stop: Callable[[], bool], **keywords: Any) -> Any:
        chosen = {"first evaluation": 0, "evaluation": 2, "last evaluation": 4}.get(phase) == next(evaluations)
        batches = iter(range(100))

        def stop_in_the_middle() -> bool:
            if next(batches) == 1 and chosen:
                halt()
            return stop()

        return evaluate(*arguments, stop=stop_in_the_middle, **keywords)

    def writing(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        if phase == "save" and folder.name.startswith("step-00000003"):
            halt()

    monkeypatch.setattr(moe.train.loop, "take_step", stepping)
    monkeypatch.setattr(moe.train.loop, "evaluate", evaluating)
    monkeypatch.setattr(checkpoint, "_write", writing)
    train(cfg, print)


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, to compare interrupted ones with; not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        noisy(patch)
        train(settings(corpus, folder))
    return folder
