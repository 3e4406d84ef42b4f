"""Claims about `python -m experiments.export`: what transformers makes of the folder, and what is refused."""

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import transformers
import yaml
from hydra.core.global_hydra import GlobalHydra

import experiments.export
from moe.eval.generate import generate
from moe.run.load import load_run
from tests.small_runs import files, settings, train

EXPORTABLE = {"model.qk_norm": "head", "tokenizer.name": "bpe", "tokenizer.vocab_size": 300}
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


def test_transformers_reads_and_continues_text_as_the_run_does(export, trained):
    before = files(trained)
    folder, status, out, err = export()
    assert (status, err) == (0, "")
    assert files(trained) == before
    assert out.startswith(f"exported: {folder}  qwen3_moe, ")
    model, tokenizer, _ = load_run(trained)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == hf.config.eos_token_id == tokenizer.eot
    for text in TEXTS:
        prompt = theirs(text, return_tensors="pt")
        assert prompt.input_ids[0].tolist() == tokenizer.encode(text)
        with torch.no_grad():
            torch.testing.assert_close(hf(**prompt).logits, model(prompt.input_ids).logits_BSV, rtol=1e-4, atol=1e-5)
        said = hf.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        ours = generate(model, tokenizer.encode(text), 12, temperature=0, eot=tokenizer.eot)
        assert theirs.decode(said) == tokenizer.decode([*tokenizer.encode(text), *ours])


def test_what_transformers_does_with_documents_that_the_run_kept_separate_is_said(export, tmp_path, corpus):
    folder = tmp_path / "separate"
    train(settings(corpus, folder, EXPORTABLE | {"data.documents": "separate", "train.steps": 1, "optim.warmup": 0}))
    assert "data.documents=separate: transformers attends across documents" in export(f"run={folder}")[2]
    assert "attends across" not in export(f"to={tmp_path / 'another'}")[2]


def test_a_folder_without_a_tokenizer_is_written_only_when_asked_for(export):
    folder, status, out, _ = export("with_tokenizer=false", "which=last")
    assert (status, sorted(path.name for path in folder.iterdir())) == (0, ["config.json", "model.safetensors"])
    assert "no tokenizer" in out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run=", "run=... is needed"),
        ("to=", "to=... is needed"),
        ("run=nowhere", "run=nowhere is not a run's folder"),
        ("which=step-5", "which=step-5 is not one of"),
        ("with_tokenizer=byte", "with_tokenizer=byte must be true or false"),
        ("form=gguf", "form is not a setting"),
        ("format=gguf", "format=gguf is not one of transformers, c"),
        ("dtype=int8", "dtype=int8 is for format=c"),
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


def test_a_model_that_transformers_has_no_name_for_is_refused_by_the_setting(export, trained, tmp_path, corpus):
    train(settings(corpus, tmp_path / "shared", {"model.moe.n_shared": 1, "train.steps": 1, "optim.warmup": 0}))
    folder, status, _, err = export(f"run={tmp_path / 'shared'}")
    assert (status, "model.moe.n_shared=1 has no counterpart" in err, folder.exists()) == (2, True, False)


@pytest.mark.parametrize("place", ["", "payload"], ids=["elsewhere", "in the run's folder"])
def test_a_router_of_ones_own_is_refused_without_an_option_that_there_is_not(place, export, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "payload.py").write_text("raise SystemExit('imported')")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["router"]["name"] = f"{place or 'nothing_there'}:Own"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    folder, status, _, err = export(f"run={run}")
    assert (status, folder.exists()) == (2, False)
    assert err.startswith(f"error: run={run} has router.name={tree['router']['name']}, a class of one's own, which")
    assert "trust" not in err


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
    _, status, _, err = export("format=c", "with_tokenizer=false")
    assert (status, err.startswith("error: with_tokenizer=false has no meaning for format=c")) == (2, True)
