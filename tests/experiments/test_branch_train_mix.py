"""Claims about `python -m experiments.branch_train_mix`: the lines it writes, and what it refuses."""

import json
import sys
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra

import experiments.branch_train_mix
from experiments.study.branches import ARMS
from moe.run.summary import read_summary
from tests.small_runs import overrides

DOMAINS = ("algebra", "botany")


@pytest.fixture
def command(corpus, tmp_path, monkeypatch, capsys):
    """(words) -> exit status, stdout, stderr of a study of one seed in tmp_path/study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(*words):
        without = ("data.name", "model.moe.n_experts", "model.moe.d_expert", "train.eval_every", "checkpoint.every")
        tree = {k: v for k, v in overrides(corpus, "study", {"train.steps": 4}).items() if k not in without}
        given = [f"{key}={value}" for key, value in tree.items()]
        small = ("data=text", "tokenizer=byte", f"data.domains=[{','.join(DOMAINS)}]", "seeds=[0]")
        words = (*small, *given, "copy_steps=2", "mix_steps=2", *words)
        monkeypatch.setattr(sys, "argv", ["branch_train_mix.py", *words])
        GlobalHydra.instance().clear()
        status = 0
        with mock.patch("os.fsync"):
            try:
                experiments.branch_train_mix.main()
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()

    return call


def test_a_study_writes_a_line_per_model_and_seed_and_is_not_repeated(command, tmp_path):
    status, out, err = command()
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    names = {*ARMS, *(f"copy-{domain}" for domain in DOMAINS)}
    assert sorted(line["arm"] for line in lines) == sorted(names)
    # What a line says is what the finished run says, on the text of all chosen domains.
    for line in lines:
        assert list(line["domains"]) == list(DOMAINS)
        assert (line["counts"] is None) == (line["arm"] in ("dense", "average", "continued") or "copy" in line["arm"])
        if line["arm"] in ("mixed", "scratch", "dense"):
            summary = read_summary(tmp_path / "study" / f"seed{line['seed']}" / line["arm"])
            assert line["loss"] == pytest.approx(summary.val.loss, rel=1e-12)
            assert line["counts"] == (summary.load.counts if summary.load else None)
        assert line["command"].startswith(
            "python -m experiments.branch_train_mix data=text tokenizer=byte 'data.domains=["
        )
    assert "| mixed " in out
    assert "expert 1 (botany)" in out
    # Again, with a seed more: what is there is read.
    status, out, err = command("seeds=[0,1]")
    assert (status, err) == (0, "")
    assert out.count("is finished  val loss") == 6 + len(DOMAINS)
    again = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    strip = lambda line: {key: value for key, value in line.items() if key != "command"}
    assert [strip(line) for line in again[: len(lines)]] == [strip(line) for line in lines]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("data.domains=[algebra,law]",), "data.domains has 'law'; the domains of data.path="),
        (("data.domains=[algebra]",), "data has 1 domain (algebra): a model for each needs two or more"),
        (("model.moe.n_experts=4",), "model.moe.n_experts cannot be given: it follows from the domains"),
        (("seed=3",), "seed cannot be given: give seeds=[...]"),
        (("seeds=[0,0]",), "seeds=[0, 0] must be different numbers"),
        (("source=study",), "source and tune cannot be given"),
        (("copy_steps=0",), "copy_steps=0"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(command, tmp_path, words, sentence):
    status, _, err = command(*words)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "study").exists()
