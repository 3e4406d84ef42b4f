"""What a step leaves besides checkpoints: lines in the run's files, in trackers, and on the screen."""

import dataclasses
from types import TracebackType

import torch

from moe.analysis.doctor import Doctor
from moe.analysis.replay import Recording
from moe.config.model import layer_moe, moe_layers
from moe.config.run import Config
from moe.run import jsonl
from moe.run.lock import Lock
from moe.run.summary import MetricsLine, line_to_json, read_metrics
from moe.train.progress import Watch
from moe.train.step import LayerTotals
from moe.train.trackers import Trackers

NAME_WIDTH = 24  # of a run's name before its bar


class Recorder:
    """Use as a context manager, so that every file is closed. Every method raises `BadInput` where the folder is no
    longer the lock's, and writes nothing there. `step`: the last one taken."""

    def __init__(self, cfg: Config, lock: Lock, step: int) -> None:
        self.cfg, self.lock, folder = cfg, lock, lock.folder
        name = folder.name if len(folder.name) <= NAME_WIDTH else f"{folder.name[: NAME_WIDTH - 1]}…"
        self.watch = Watch(name, cfg.train.steps, step, cfg.log.every)
        self.lines = jsonl.Lines(folder / "metrics.jsonl")
        self.counts = jsonl.Lines(folder / "routing" / "counts.jsonl")
        self.choices = Recording(folder, cfg, step, self.watch.say)
        self.trackers = Trackers(cfg, folder, step)
        before = read_metrics(folder) if cfg.log.doctor and (folder / "metrics.jsonl").is_file() else []
        self.doctor = Doctor(fair_loads(cfg)).catch_up(before)

    def __enter__(self) -> "Recorder":
        self.watch.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.watch.__exit__(kind, error, trace)
        for file in (self.choices, self.counts, self.lines, self.trackers):
            file.close()

    def keep_files(self) -> None:
        """Make again what was deleted of the files. Raises `BadInput` for what cannot be."""
        self.lock.check()
        self.lines.keep()
        self.counts.keep()
        self.choices.check()

    def record(self, line: MetricsLine, routing: list[LayerTotals] | None = None) -> None:
        """A metrics line, and what the MoE layers did in its step; None before the first."""
        self.lock.check()
        loads = [layer.count_E for layer in routing or []]
        alarms = self.doctor.read(line) if self.cfg.log.doctor else []
        line = dataclasses.replace(line, alarms=alarms or None)
        self.lines.write(line_to_json(line))
        due = line.step % self.cfg.log.every == 0
        self.trackers.log(line, [count_E.tolist() for count_E in loads] if due else [])
        self.watch.step(line, loads)
        for alarm in alarms:
            self.watch.say(f"alarm: {alarm.sentence()}")
        if routing and self.cfg.log.experts:
            self.choices.write(line.step, [torch.cat(layer.expert) for layer in routing])
        if routing and line.step % self.cfg.log.every == 0:
            self.counts.write({"step": line.step, "counts": [count_E.tolist() for count_E in loads], **mass(routing)})


def fair_loads(cfg: Config) -> dict[int, float]:
    """Rows of a step that a fair load has, by MoE layer."""
    moes = {layer: layer_moe(cfg.model, layer) for layer in moe_layers(cfg.model)}
    tokens = cfg.train.batch_size * cfg.model.context
    return {layer: tokens * moe.k / (moe.n_experts + moe.n_cheap) for layer, moe in moes.items()}


def mass(routing: list[LayerTotals]) -> dict[str, list[list[float]]]:
    """ "prob": every expert's mean probability, by layer; nothing where routers have none or nobody watches."""
    if not all("prob" in layer.seen for layer in routing):
        return {}
    shares = [layer.seen["prob"] / layer.seen["prob"].sum() for layer in routing]
    return {"prob": [[float(f"{share:.4g}") for share in share_E.tolist()] for share_E in shares]}
