"""Claims about command lines that are printed: pasted, they mean what they were made of."""

import argparse
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe.run.command_line import Options, command_line, override

NAMES = [
    "runs/demo", "mine", "two words", "a=b", "a,b", "it's", '"', "[1", "{x", "(", "#x", "a:b", "é", "\\", "a\\'b",
    "${x}", "$HOME", "~", "*", "", "null", "True", "1e3", "007", "inf", "-1", "+x", "a\nb", "runs/a=1,b=[2]", "/",
]  # fmt: skip


def read_back(line: str) -> list[str]:
    """The words of a command line as the shell hands them over."""
    return shlex.split(line)


def value_of(word: str) -> str:
    """What Hydra and OmegaConf make of a text setting."""
    (parsed,) = OverridesParser.create().parse_overrides([word])
    tree = OmegaConf.create({parsed.key_or_group: parsed.value()})
    return OmegaConf.to_container(tree, resolve=True)[parsed.key_or_group]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back_as_it_is(name):
    *start, word, last = read_back(command_line("train", override("run", name), "resume=true"))
    assert (start, last) == (["python", "-m", "experiments.train"], "resume=true")
    assert value_of(word) == name


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=12))
def test_so_is_any_text(name):
    _, _, _, word = read_back(command_line("train", override("run", name)))
    assert value_of(word) == name


@pytest.mark.parametrize("value", [3, 1e-05, True, False, None, [0.9, 0.95], [1, 2], ["a", "b"], []])
def test_so_is_a_value_that_is_no_text(value):
    _, _, _, word = read_back(command_line("train", override("key", value)))
    assert value_of(word) == value


@pytest.mark.parametrize("name", ["runs/demo-1", "/data/runs/a.b", "mine"])
def test_a_name_without_a_special_character_is_not_quoted(name):
    assert command_line("train", override("run", name)) == f"python -m experiments.train run={name}"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--sise", "1"], "--sise is no option; did you mean --size."),
        (["--zzz=3"], "--zzz is no option; accepted: --help, --name, --size, --speed."),
        (["--siz", "1"], "--siz is no option; did you mean --size."),
        (["--size", "x"], "--size x must be a whole number."),
        (["--size"], "--size needs a value."),
        (["--name", "c"], "--name c is not one of a, b."),
        (["--size", "1"], "--speed is needed: tokens per second."),
    ],
)
def test_what_options_cannot_be_is_one_sentence(given, sentence, capsys):
    options = Options("What it is.")
    options.add_argument("--size", type=int)
    options.add_argument("--name", choices=("a", "b"))
    options.add_argument("--speed", required=sentence.startswith("--speed"), help="tokens per second")
    options.add_argument("--hidden", help=argparse.SUPPRESS)
    with pytest.raises(SystemExit, match="2"):
        options.parse_args(given)
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
