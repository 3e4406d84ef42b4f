"""Claims about what `--help` says."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import BenchConfig
from experiments.compare import CompareConfig
from experiments.generate import GenerateConfig
from experiments.pages import help_page
from experiments.upcycle import UpcycleConfig
from moe.config.parse import settings
from moe.config.run import Config

ROOT = Path(__file__).parents[3]
SOURCE = '''
class Example:
    """It has fields."""

    a: int = 1  # behind
    # above,
    # in two lines
    b: Annotated[int, Between(0, 1)] = field(default_factory=list)

    # --- A heading

    c: str = "# no comment"
    d: str = ""  # behind, and
    # going on below
    e: str = ""  # its own

    def __post_init__(self) -> None:
        # of the code
        self.a = 2  # too
'''


def test_a_fields_comment_stands_behind_it_or_above_it():
    assert help_page.comments(SOURCE) == {
        "a": "behind",
        "b": "above, in two lines",
        "c": "",
        "d": "behind, and going on below",
        "e": "its own",
    }


SCHEMAS = [Config, BenchConfig, CompareConfig, GenerateConfig, UpcycleConfig]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_has_a_meaning(schema):
    assert [line for line in help_page.setting_lines(schema, {}) if line.endswith(")") and "): " not in line] == []


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_has_a_line_with_its_name(schema):
    lines = help_page.setting_lines(schema, {})
    assert len(lines) == len({line.partition("=")[0] for line in lines})
    named = {line.partition("=")[0] for line in lines}
    groups = set(settings(schema)) - named
    assert all(any(name.startswith(f"{group}.") for name in named) for group in groups)


def test_a_line_says_value_what_is_accepted_and_what_it_means():
    values = {"optim.warmup": -1, "train.precision": "auto", "resume": False, "optim.betas": [0.9, 0.95], "run": ""}
    lines = dict(line.split("=", 1) for line in help_page.setting_lines(Config, values))
    assert lines["optim.warmup"] == "-1  (a whole number, at least -1): steps; -1: a tenth of the run, at most 50"
    assert lines["train.precision"].startswith("auto  (auto, bf16, fp32): auto | bf16 (autocast) | fp32; auto: ")
    assert lines["resume"].startswith("false  (true or false): continue the run if its folder exists; ")
    assert lines["optim.betas"].startswith("[0.9,0.95]  (a list of numbers, like [0.1,0.2])")
    assert lines["run"].startswith('""  (text): the run\'s folder')
    assert lines["balance.schedule"].startswith("{}  (a group of names and values, like {a: 1})")
    assert lines["data.val_fraction"].endswith(
        "  (a number, between 0.0001 and 0.5): share of documents, by hash, held out"
    )


def test_the_command_prints_its_docstring_the_files_and_the_settings_as_given():
    command = [sys.executable, "-m", "experiments.train", "--help", "model=cpu-nano", "optim.lr=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Train one model.\n")
    for line in (
        "  optim=cosine | muon | wsd",
        "  optim.lr=0.5  (a number, at least 0): peak learning rate",
        "  model.name=cpu-nano  (text): what runs and tables call it",
    ):
        assert f"\n{line}\n" in done.stdout
    assert all(len(line) <= 130 for line in done.stdout.splitlines())
