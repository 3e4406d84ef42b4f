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


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["names=[gpt2,gpt-2]"], "names has 'gpt-2', which is not in conf/model; did you mean gpt2."),
        (["names=[gpt2]", "context=-1"], "context=-1 is out of range: accepted is at least 0."),
        (["names=[gpt2]", "vocab_size=0"], "vocab_size=0 is out of range: accepted is at least 1."),
        (["names=[gpt2]", "vocab_size=many"], "vocab_size=many must be a whole number."),
        (["-m", "names=[gpt2],[gpt-2]"], "names has 'gpt-2', which is not in conf/model; did you mean gpt2 (in the"),
    ],
)
def test_what_cannot_be_counted_is_refused_before_anything_is(given, sentence, monkeypatch, capsys):
    monkeypatch.setattr(command, "size", lambda *_: pytest.fail("something was counted"))
    monkeypatch.setattr(sys, "argv", ["presets", *given])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {sentence}")
    assert printed.err.count("\n") == 1
