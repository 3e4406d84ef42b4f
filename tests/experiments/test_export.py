"""Claims about `python -m experiments.export`: what the two files do, and what is refused."""

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hydra.core.global_hydra import GlobalHydra

import experiments.export
from moe.eval.generate import generate
from moe.run.load import load_run
from tests.small_runs import files, settings, train

EXPORTABLE = {"tokenizer.name": "bpe", "tokenizer.vocab_size": 300}
TEXTS = ["The end of <|endoftext|> it all", "naïve 漢字 😀  \n\n 1234"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(settings(corpus, folder, EXPORTABLE))
    return folder


@pytest.fixture
def export(trained, tmp_path, monkeypatch):
    """(arguments) -> (the folder, exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", f"run={trained}", f"to={tmp_path / 'out'}", *arguments])
        GlobalHydra.instance().clear()
        status, out, err = 0, io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                experiments.export.main()
            except SystemExit as end:
                status = end.code
        return tmp_path / "out", status, out.getvalue(), err.getvalue()

    return call


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run=", "run=... is needed"),
        ("to=", "to=... is needed"),
        ("run=nowhere", "run=nowhere is not a run's folder"),
        ("which=step-5", "which=step-5 is not one of"),
        ("form=gguf", "form is not a setting"),
        ("format=gguf", "format=gguf is not c: python -m experiments.convert writes"),
        ("dtype=int4", "dtype=int4 is not one of fp32, int8"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(argument, message, export):
    folder, status, _, err = export(argument)
    assert status == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not folder.exists()


def test_a_folder_with_anything_in_it_is_left_alone(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    _, status, _, err = export()
    assert (status, "exists already" in err) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")
def test_a_trained_run_becomes_two_files_that_continue_text_as_it_does(export, trained):
    before = files(trained)
    folder, status, out, err = export("format=c")
    assert (status, err) == (0, "")
    assert files(trained) == before
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "run.c"]
    # The lines that the command prints make the program and run it.
    compiling, running = (line.partition(":")[2] for line in out.splitlines()[1:3])
    subprocess.run(compiling, shell=True, check=True)
    assert subprocess.run(running, shell=True, capture_output=True, check=True).stdout
    model, tokenizer, _ = load_run(trained)
    for text in TEXTS:
        command = [folder / "run", folder / "model.bin", "-p", text, "-n", "256", "-t", "0"]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        ours = generate(model, tokenizer.encode(text), 256, temperature=0, eot=tokenizer.eot)
        assert said == tokenizer.decode_bytes(ours) + b"\n"


def test_what_the_program_has_not_is_refused_before_anything_is_written(export, tmp_path, corpus):
    null = {"model.moe.n_null": 1, "train.steps": 1, "optim.warmup": 0}
    train(settings(corpus, tmp_path / "null", null))
    folder, status, _, err = export(f"run={tmp_path / 'null'}", "format=c")
    assert (status, err.count("\n"), folder.exists()) == (2, 1, False)
    assert err.startswith("error: model.moe.n_null=1 has no counterpart in run.c: accepted is 0.")
