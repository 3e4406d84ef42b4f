"""Claims about the command that rounds weights and measures what it costs."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from experiments import quantize
from moe.analysis.tracing import What, windows_of_run
from moe.convert.quantize import DTYPES, Rounding, rounded
from moe.eval.scores import score
from moe.model.transformer import next_token_loss
from moe.run.load import load_run
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, str(folder), {"train.eval_tokens": 10**9, "model.moe.d_expert": 32}))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.quantize`."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, words)])
        code = 0
        try:
            quantize.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_cost_is_of_the_runs_validation_in_all_by_domain_by_expert_and_in_routes(run, command, tmp_path):
    code, printed, err = command(f"run={run}", "dtype=int4", "experts=true", "tokens=0", f"out={tmp_path / 'lines'}")
    assert code == 0, err
    model, tokenizer, cfg = load_run(run, "best")
    windows = list(windows_of_run(What(tokens=0), cfg, tokenizer))
    lines = lines_of(tmp_path / "lines")
    effects, flipped = [line for line in lines if "total" in line], [line for line in lines if "flipped" in line]
    singles = [f"int4 {layer}:{e}" for layer in range(cfg.model.n_layers) for e in range(cfg.model.moe.n_experts)]
    assert [effect["what"] for effect in effects] == ["int4 every matrix", "int4 all experts", *singles]
    # Two of them by hand.
    for effect, rounding in ((effects[0], Rounding("int4")), (effects[3], Rounding("int4", {0: [1]}))):
        with torch.no_grad(), rounded(model, rounding):
            losses = [
                next_token_loss(model(torch.from_numpy(batch[0][:, :-1])).logits_BSV, torch.from_numpy(batch[0][:, 1:]))
                for batch in windows
            ]
        sizes = [batch[1].size for batch in windows]
        assert effect["total"]["after"] == pytest.approx(
            np.average([float(x) for x in losses], weights=sizes), rel=1e-5
        )
    assert set(effects[0]["domains"]) == set(effects[3]["domains"]) != set()
    # Experts come behind the first router.
    share = {(line["what"], line["layer"]): line["flipped"] for line in flipped}
    assert share["int4 all experts", 0] == 0
    assert share["int4 every matrix", 0] > 0
    assert "tokens with other experts" in printed


def test_a_format_of_the_kernels_costs_what_evaluate_says_that_experts_stored_in_it_do(run, command, tmp_path):
    code, printed, err = command(f"run={run}", "dtype=mxfp4", "tokens=0", f"out={tmp_path / 'lines'}")
    assert code == 0, err
    effects = {line["what"]: line["total"] for line in lines_of(tmp_path / "lines") if "total" in line}
    assert effects.keys() == {"mxfp4 every matrix", "mxfp4 all experts"}
    (_, tokenizer, cfg), windows = load_run(run), effects["mxfp4 all experts"]["tokens"]
    text = windows_of_run(What(tokens=0), cfg, tokenizer)
    for key, experts in (("before", ""), ("after", "mxfp4")):
        scored = score(load_run(run, experts=experts)[0], text, tokenizer)[0]
        assert scored.tokens == windows
        assert effects["mxfp4 all experts"][key] == pytest.approx(scored.loss.value, rel=1e-6)
    assert effects["mxfp4 all experts"]["difference"] != 0
    assert "| mxfp4 all experts " in printed


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")
def test_the_program_is_measured_by_its_own_losses_and_says_what_torch_says(run, command, tmp_path):
    for words in (("program=true",), ()):
        code, printed, err = command(f"run={run}", "tokens=512", f"out={tmp_path / ('lines' + ''.join(words))}", *words)
        assert code == 0, err
        assert ("run.c in float32 is at most" in printed) == bool(words)
    (of_program,), of_torch = lines_of(tmp_path / "linesprogram=true"), lines_of(tmp_path / "lines")
    assert of_program["what"] == "run.c int8"
    assert of_program["total"] == pytest.approx(of_torch[0]["total"], abs=1e-5)
    assert of_program["total"] != of_torch[0]["total"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "run=... is needed"),
        (("run=x", "dtype=int2"), f"dtype=int2 is not one of {', '.join(DTYPES)}"),
        (("run=x", "dtype=int4", "program=true"), "program=true is for dtype=int8 and experts=false"),
        (("run=x", "tokens=-1"), "tokens=-1 is out of range"),
        (("run=x", "out=."), "out=. exists"),
        (("run=nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words, message, command):
    code, printed, err = command(*words)
    assert (code, printed) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_width_without_groups_is_refused_and_nothing_is_written(tmp_path, corpus, command):
    train(settings(corpus, str(tmp_path / "run"), {}))
    code, _, err = command(f"run={tmp_path / 'run'}", f"out={tmp_path / 'lines'}")
    assert (code, (tmp_path / "lines").exists()) == (2, False)
    assert "dtype=int8 needs groups of 32 to 64 weights" in err


def test_a_run_whose_products_are_in_fp8_is_refused(tmp_path, corpus, command):
    train(settings(corpus, str(tmp_path / "run"), {"model.moe.precision": "fp8"}))
    code, _, err = command(f"run={tmp_path / 'run'}", "dtype=mxfp4", f"out={tmp_path / 'lines'}")
    assert (code, (tmp_path / "lines").exists()) == (2, False)
    assert "rounds its experts itself (model.moe.precision=fp8): accepted is a run whose products are not" in err
