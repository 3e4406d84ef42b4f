"""What every preset of conf/model costs: parameters, active parameters, FLOPs per token. No weight is allocated.

python -m experiments.presets
python -m experiments.presets names=[gpt2,olmoe-1b-7b] context=1024
"""

from dataclasses import dataclass, field

import yaml

from experiments import cli
from experiments.pages import tables
from moe.config.model import ModelConfig
from moe.config.parse import nearest, parse
from moe.errors import BadInput
from moe.model.cost import flops, size


@dataclass
class PresetsConfig:
    """Which presets, and at which sequence length."""

    names: list[str] = field(default_factory=list)  # empty: all
    context: int = 0  # 0: each preset's own
    vocab_size: int = 4096  # for presets that take their tokenizer's

    def __post_init__(self) -> None:
        for key, low in (("context", 0), ("vocab_size", 1)):
            if getattr(self, key) < low:
                raise BadInput(f"{key}={getattr(self, key)} is out of range: accepted is at least {low}.")
        for name in self.names:
            if name not in presets():
                raise BadInput(f"names has {name!r}, which is not in conf/model; {nearest(name, presets())}.")


def presets() -> list[str]:
    """The names of all."""
    return sorted(path.stem for path in (cli.CONF / "model").glob("*.yaml"))


@cli.command("presets", PresetsConfig)
def main(cfg: PresetsConfig) -> None:
    """Print a row per preset."""
    rows = []
    for name in cfg.names or presets():
        model = read_preset(name, cfg.vocab_size)
        cost = flops(model, context=cfg.context)
        total, active = size(model)
        cells = (total, active, cfg.context or model.context, cost.forward, cost.training)
        rows.append((name, *(f"{cell:,}" for cell in cells)))
    headings = ("model", "parameters", "active", "context", "FLOPs per token, forward", "training")
    tables.print_table(headings, rows)


def read_preset(name: str, vocab_size: int) -> ModelConfig:
    """conf/model/<name>.yaml, with `vocab_size` where it leaves that to the tokenizer."""
    model = parse(ModelConfig, yaml.safe_load((cli.CONF / "model" / f"{name}.yaml").read_text()), "model.")
    model.vocab_size = model.vocab_size or vocab_size
    return model


if __name__ == "__main__":
    main()
