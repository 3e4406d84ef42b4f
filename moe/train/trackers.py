"""Metrics to TensorBoard, Weights & Biases and trackio, by config; each is an extra, imported when asked for."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.analysis import heat_map
from moe.config.parse import to_dict
from moe.config.run import Config
from moe.errors import BadInput
from moe.run.summary import MetricsLine, line_to_json

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
HEAT_MAP = "routing/load"
CAPTION = "load over a fair share, a row per MoE layer, a column per expert: blue a quarter or less, orange 4 or more"


def check(cfg: Config, prefix: str = "log.") -> None:
    """Raise `BadInput` for a tracker whose package is not installed; `prefix`: of the setting that asks for it."""
    for name, package in NEEDS.items():
        if getattr(cfg.log, name) and importlib.util.find_spec(package) is None:
            raise BadInput(
                f"{prefix}{name}={getattr(cfg.log, name)} needs the package {package}, which is not installed: "
                f"pip install 'moe-switchyard[{name}]'."
            )


def flatten(line: MetricsLine) -> dict[str, float]:
    """A metrics line as flat names: loss, val/loss, val/drama/bpb, routing/layer_03/max_vio, ..."""
    flat = {name: value for name, value in line_to_json(line).items() if isinstance(value, int | float)}
    flat |= {f"answers/{name}": value for name, value in (line.answers or {}).items()}
    for metrics in line.layers or []:
        values = dataclasses.asdict(metrics)
        values |= values.pop("losses")
        values = {name: value for name, value in values.items() if name != "layer" and value is not None}
        flat |= {f"routing/layer_{metrics.layer:02d}/{name}": value for name, value in values.items()}
    if line.val:
        flat |= {"val/loss": line.val.loss, "val/bpb": line.val.bpb}
        for domain, score in line.val.domains.items():
            flat |= {f"val/{domain}/loss": score.loss, f"val/{domain}/bpb": score.bpb}
    return flat


class Trackers:
    """All trackers the config names, behind one `log` and one `close`."""

    def __init__(self, cfg: Config, run: Path, step: int) -> None:
        """`step`: the last one taken; what TensorBoard holds of later ones, an interrupted run's, no longer counts."""
        check(cfg)
        self.board: Any = None
        self.others: list[Any] = []
        self.draws = importlib.util.find_spec("PIL") is not None  # what trackers keep images with
        if cfg.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        if cfg.log.wandb:
            import wandb

            wandb.init(
                project=cfg.log.wandb, id=run.name, name=run.name, dir=str(run), resume="allow", config=to_dict(cfg)
            )
            self.others.append(wandb)
        if cfg.log.trackio:
            import trackio

            trackio.init(project=cfg.log.trackio, name=run.name, resume="allow", config=to_dict(cfg))
            self.others.append(trackio)

    def log(self, line: MetricsLine, counts: Sequence[Sequence[int]] = ()) -> None:
        """Send one metrics line, and the load of layer by expert as a heat map; `counts`: routed rows by (MoE layer,
        expert)."""
        flat = flatten(line)
        picture = heat_map.image(counts) if counts and self.draws else None
        if self.board:
            for key, value in flat.items():
                self.board.add_scalar(key, value, line.step)
            if picture is not None:
                self.board.add_image(HEAT_MAP, picture, line.step, dataformats="HWC")
        for tracker in self.others:
            drawn: dict[str, Any] = {}
            if picture is not None and hasattr(tracker, "Image"):
                drawn[HEAT_MAP] = tracker.Image(picture, caption=CAPTION)
            tracker.log(flat | drawn, step=line.step)

    def close(self) -> None:
        """Flush and finish."""
        if self.board:
            self.board.close()
        for tracker in self.others:
            tracker.finish()
