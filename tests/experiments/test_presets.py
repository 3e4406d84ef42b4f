"""Claims about the command that prints what presets cost."""

import sys

import pytest
import yaml

from experiments import presets as command
from experiments.cli import CONF
from moe.config.run import build
from moe.model import cost


def _preset(name, vocab_size=4096):
    cfg = build({"model": yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())}).model
    cfg.vocab_size = cfg.vocab_size or vocab_size
    return cfg


def test_the_command_prints_a_row_per_preset(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["presets", "names=[gpt2,olmoe-1b-7b]", "context=1024"])
    command.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    for (name, total, active, context, forward, training), preset in zip(rows, ("gpt2", "olmoe-1b-7b"), strict=True):
        size, flops = cost.size(_preset(preset)), cost.flops(_preset(preset), context=1024)
        assert (name, context) == (preset, "1,024")
        assert (total, active) == (f"{size.total:,}", f"{size.active:,}")
        assert (forward, training) == (f"{flops.forward:,}", f"{flops.training:,}")


def test_the_command_refuses_a_preset_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["presets", "names=[gpt-2]"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "did you mean gpt2" in capsys.readouterr().err
