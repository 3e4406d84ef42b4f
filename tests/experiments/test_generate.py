"""The generate command: prompts, what it prints, what it refuses."""

import os
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments import cli
from experiments.generate import GenerateConfig, main, repr_token, say, show_next
from experiments.pages.tables import markdown
from kernels.quantized import FORMATS
from moe.errors import BadInput
from moe.eval.generate import LayerChoice, generate, next_tokens, stream_text
from moe.model.quantized import storage
from moe.run import terminal
from moe.run.load import load_run
from tests.small_models import BYTES

NASTY = [
    "To be, or not: that (is) [the] {question}",
    "it's \"quoted\" 'twice'",
    "",
    "  ",
    "3",
    "null",
    "???",
    "${oc.env:HOME} \\${x} \\\\${y}\\",
    "${",
    "ends in \\'",
    "a\nb\t#c",
    "key=value ~ * @ % naïve 漢字 😀",
]


@pytest.mark.parametrize("prompt", NASTY)
def test_a_nasty_prompt_survives_the_command_line(prompt):
    ConfigStore.instance().store(name="schema_generate", node=GenerateConfig)
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        tree = hydra.compose("generate", overrides=["run=r", cli.literal(f"prompt={prompt}", ("prompt",))])
    assert cli.typed(tree, GenerateConfig).prompt == prompt


@settings(max_examples=100)
@given(st.text(st.one_of(st.sampled_from("\\'\"${}:,=[]()\n "), st.characters(exclude_categories=["Cs"])), max_size=12))
def test_any_prompt_survives_the_override_grammar(prompt):
    override = OverridesParser.create().parse_override(cli.literal(f"prompt={prompt}", ("prompt",)))
    assert not override.is_sweep_override()
    assert OmegaConf.to_container(OmegaConf.create({"prompt": override.value()}), resolve=True) == {"prompt": prompt}


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    main()


def test_the_command_prints_the_prompt_and_what_the_model_says(monkeypatch, capsys, made_run):
    prompt = "To be, or 'not' ${x}: 漢"
    command(monkeypatch, f"run={made_run}", f"prompt={prompt}", "max_new=20", "seed=3", "temperature=1.5", "which=last")
    model, tokenizer, _ = load_run(made_run, "last")
    ids = generate(
        model, tokenizer.encode(prompt), 20, temperature=1.5, top_k=50, top_p=0.95, seed=3, eot=tokenizer.eot
    )
    assert capsys.readouterr().out == prompt + "".join(stream_text(tokenizer, ids)) + "\n"


@pytest.mark.parametrize("prompt", ["To be", ""])
def test_show_next_prints_tokens_and_the_experts_of_every_moe_layer(monkeypatch, capsys, made_run, prompt):
    command(monkeypatch, f"run={made_run}", f"prompt={prompt}", "show=next", "n=3")
    model, tokenizer, _ = load_run(made_run)
    tokens, choices = next_tokens(model, list(prompt.encode()) or [tokenizer.eot], 3)
    rows = [(repr_token(tokenizer, each), str(each), f"{prob:.4f}") for each, prob in tokens]
    chosen = [(str(layer), ", ".join(f"{e} ({w:.3f})" for e, w in experts)) for layer, experts in choices]
    expected = markdown(("next token", "id", "probability"), rows) + "\n"
    assert capsys.readouterr().out == expected + markdown(("layer", "experts (weight)"), chosen)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prompt=x"], "run=... is needed"),
        (["run=/nowhere/x"], "run=/nowhere/x is not a run"),
        (["run=r", "temperature=-1"], "temperature=-1.0 is out of range"),
        (["run=r", "temperature=nan"], "temperature=nan is out of range"),
        (["run=r", "top_k=-1"], "top_k=-1 is out of range"),
        (["run=r", "top_p=0"], "top_p=0.0 is out of range"),
        (["run=r", "top_p=1.1"], "top_p=1.1 is out of range"),
        (["run=r", "max_new=0"], "max_new=0 is out of range"),
        (["run=r", "n=0"], "n=0 is out of range"),
        (["run=r", "seed=-1"], "seed=-1 is out of range"),
        (["run=r", "show=table"], "show=table is not one of text, next"),
        (["run=r", "temprature=1"], "did you mean temperature"),
        (["run=r", "experts=mxfp"], f"experts=mxfp is not one of {', '.join(FORMATS)}; did you mean mxfp4"),
        (["run=r", "prompt=\udcff"], "is not valid UTF-8"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_experts_in_few_bits_go_on_from_a_prompt_and_what_they_take_is_said_beside_the_text(
    monkeypatch, capsys, made_run
):
    model = load_run(made_run, experts="int8")[0]
    for words in (["max_new=20", "seed=3"], ["show=next", "n=3"]):
        command(monkeypatch, f"run={made_run}", "prompt=To be", "experts=int8", *words)
        said = capsys.readouterr()
        assert said.err == f"{storage(model)}\n"
        assert said.err.startswith("experts: int8, ")
        if words[0] == "max_new=20":
            drawn = generate(model, list(b"To be"), 20, temperature=0.8, top_k=50, top_p=0.95, seed=3, eot=256)
            assert said.out == "To be" + "".join(stream_text(BYTES, drawn)) + "\n"
        else:
            tokens, _ = next_tokens(model, list(b"To be"), 3)
            assert all(f"| {token} |" in " ".join(said.out.split()) for token, _ in tokens)


def test_experts_that_the_format_cannot_store_are_refused_by_key_and_value(monkeypatch, capsys, made_run):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, f"run={made_run}", "prompt=To be", "experts=mxfp4")
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: experts=mxfp4 cannot store model.d_model=16: mxfp4 takes rows of 32 weights or")


def test_an_interrupt_ends_the_text_with_a_line_break(capsys):
    def pieces():
        yield "said"
        raise KeyboardInterrupt

    say("I ", pieces())
    assert capsys.readouterr().out == "I said\n"


def test_a_reader_that_goes_away_ends_the_text(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", terminal.outlet(writer))
    pieces = iter(["said", "no more"])
    say("I ", pieces)
    assert list(pieces) == ["no more"], "it went on without a reader"
    print("nothing is raised later", flush=True)
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_takes_no_text_is_one_sentence(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", terminal.outlet(full.fileno()))
        with pytest.raises(BadInput, match=r"^standard output cannot be written \(No space left on device\)"):
            say("I ", iter(["said"]))


def test_a_terminal_is_shown_pictures_of_control_characters_and_a_file_gets_the_characters(monkeypatch, capsys):
    say("\x1b[2J", iter(["a\x0e\n\x9b"]))
    assert capsys.readouterr().out == "\x1b[2Ja\x0e\n\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say("\x1b[2J", iter(["a\x0e\n\x9b"]))
    assert capsys.readouterr().out == "␛[2Ja␎\n\ufffd\n"


def test_tokens_on_a_terminal_show_white_space_and_are_no_markup(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_next(BYTES, [(10, 0.5), (0xE6, 0.25), (ord("["), 0.1)], [LayerChoice(1, [(3, 0.75), (0, 0.25)])])
    shown = capsys.readouterr().out
    assert r"'\n'" in shown
    assert r"b'\xe6'" in shown
    assert "'['" in shown
    assert "3 (0.750), 0 (0.250)" in shown
