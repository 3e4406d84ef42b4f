"""Claims about the command that writes the inspector's page."""

import html
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from experiments import inspector as command
from moe.analysis import records
from moe.analysis.caveats import CAVEATS
from moe.analysis.probing import probe
from moe.analysis.trace import Trace
from moe.analysis.tracing import What
from moe.convert import hf_tokenizer
from moe.run.load import load_run
from moe.run.summary import read_summary
from tests.browser import browser, needs_browser, opened
from tests.planted_traces import random_routes, write_trace
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (("moe", {}), ("other", {"seed": 1}), ("dense", {"model.moe": None})):
        train(settings(corpus, str(folder / name), changes))
    return folder


def _inspect(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["inspector", *words])
    command.main()
    return capsys.readouterr().out


def test_a_run_becomes_a_page_and_a_second_time_its_trace_is_not_made_again(runs, tmp_path, monkeypatch, capsys):
    words = (f"run={runs / 'moe'}", f"out={tmp_path}", "tokens=600")
    printed = _inspect(monkeypatch, capsys, *words)
    assert f"page: {tmp_path / 'index.html'}" in printed
    assert "trace:" in printed
    trace = Trace(tmp_path / "trace")
    row = next(line for line in printed.splitlines() if line.startswith("| 0"))
    count_E = trace.counts[0].sum(0)
    assert f"{count_E.max() / count_E.mean() - 1:.2f}" in row
    assert (tmp_path / "index.html").read_text().count('data-run="0"') > 1
    assert "trace:" not in _inspect(monkeypatch, capsys, *words)
    assert "trace:" in _inspect(monkeypatch, capsys, *words[:2], "tokens=300"), "of another text it is made anew"


def test_a_run_that_was_trained_anew_in_the_same_place_is_traced_anew(runs, corpus, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = (f"run={run}", f"out={tmp_path / 'page'}", "tokens=300", "probe=0")
    for seed in (0, 1):
        shutil.rmtree(run, ignore_errors=True)
        train(settings(corpus, str(run), {"seed": seed}))
        assert "trace:" in _inspect(monkeypatch, capsys, *words)
    assert "trace:" not in _inspect(monkeypatch, capsys, *words)


def test_what_is_no_trace_is_never_deleted(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        _inspect(monkeypatch, capsys, f"run={runs / 'moe'}", f"out={tmp_path}")
    assert "has other files than a trace's, like thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "trace" / "thesis.tex").read_text() == "mine"


def test_by_default_the_page_stands_in_the_runs_folder_which_can_still_be_read(runs, monkeypatch, capsys):
    _inspect(monkeypatch, capsys, f"run={runs / 'other'}", "tokens=300")
    assert (runs / "other" / "inspector" / "index.html").is_file()
    assert read_summary(runs / "other").name == "other"


def test_runs_stand_side_by_side(runs, tmp_path, monkeypatch, capsys):
    printed = _inspect(
        monkeypatch, capsys, f"run={runs / 'moe'}", f"beside=[{runs / 'other'}]", f"out={tmp_path}", "tokens=300"
    )
    assert {line.partition(":")[0] for line in printed.splitlines()} >= {"moe", "other", "page"}
    text = (tmp_path / "index.html").read_text()
    assert "Side by side" in text
    assert 'data-run="1"' in text


@needs_browser
def test_the_page_of_a_run_says_what_each_expert_is_worth(runs, tmp_path, monkeypatch, capsys):
    printed = _inspect(monkeypatch, capsys, f"run={runs / 'moe'}", f"out={tmp_path}", "tokens=600", "probe=256")
    assert "probe: 8 experts" in printed
    probed = probe(runs / "moe", "best", What(tokens=256))
    with browser() as chromium:
        page = opened(chromium, tmp_path / "index.html")
        page.select_option("#layer", "1")
        page.fill("#number", "3")
        page.locator("#number").press("Enter")
        total = probed.importance[1, 3].total
        numbers = f"{total.difference:.4f} nats per token ({total.low:.4f} to {total.high:.4f})"
        assert f"Masked, the loss changes by {numbers}" in page.locator("#card").inner_text()
        twin = probed.alike[1].twin_E[3]
        assert f"Nearest twin: expert {twin}" in page.locator("#card").inner_text()
        page.select_option("#measure", "importance")
        page.locator("#load-map").focus()
        page.keyboard.press("ArrowRight")
        assert "masked, the loss changes by" in page.locator("#load-map-said").inner_text()
        assert page.get_by_text("With a share of the experts alone").is_visible()
        settled = page.locator("figure", has_text="How settled the routing is").get_attribute("data-csv").splitlines()
        by_name = {tuple(line.split(",")[:2]): float(line.split(",")[2]) for line in settled[1:]}
        told = probed.over_time.checkpoints
        for one in told:
            assert by_name["saturation", str(one.step)] == pytest.approx(np.mean(one.saturation), rel=1e-4)
        assert by_name["churn", str(told[-1].step)] == pytest.approx(np.mean(told[-1].churn), rel=1e-4)
        cells = page.locator("table", has_text="router information").locator("tbody tr").nth(1).locator("td")
        one = probed.decided[1]
        assert cells.nth(1).inner_text() == f"{one.information / math.log(4):.1%}"
        assert cells.nth(3).inner_text().startswith(f"{probed.lookahead[0].agreement:.0%} (by chance")
        assert page.said == []


def test_a_model_with_many_experts_is_not_asked_unless_one_says_so(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FEW", 4)
    printed = _inspect(monkeypatch, capsys, f"run={runs / 'moe'}", f"out={tmp_path}", "tokens=300")
    assert "probe:" not in printed
    assert "Not asked: masking 8 experts in turn takes as many passes." in (tmp_path / "index.html").read_text()


def test_beside_a_metric_stands_what_it_cannot_tell(runs, tmp_path, monkeypatch, capsys):
    _inspect(monkeypatch, capsys, f"run={runs / 'moe'}", f"out={tmp_path}", "probe=0")
    text = html.unescape((tmp_path / "index.html").read_text())
    for name in ("lift of a domain", "names beyond tokens", "bits of domain"):
        assert CAVEATS[name].drawn
        assert CAVEATS[name].cannot_tell in text
    for name, caveat in CAVEATS.items():
        if not caveat.drawn:
            assert caveat.cannot_tell not in text, f"{name} fails the table: it is not drawn"


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])
def theirs(request, runs, tmp_path_factory):
    """A random model that transformers made, with the tokenizer of a run."""
    import transformers

    sizes = dict(
        vocab_size=257, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    if request.param == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=4, **sizes)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.OlmoeConfig(num_experts=4, **sizes)
        model = transformers.OlmoeForCausalLM(config)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    hf_tokenizer.save_tokenizer(load_run(runs / "moe")[1], folder, 64)
    return folder


@needs_browser
@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_model_that_transformers_made_becomes_a_page(theirs, tmp_path, monkeypatch, capsys, stream):
    (tmp_path / "a.txt").write_text("To be, or not to be: that is the question. " * 30)
    words = (f"hf={theirs}", f"out={tmp_path / 'page'}", f"text={tmp_path / 'a.txt'}", f"stream={stream}")
    printed = _inspect(monkeypatch, capsys, *words)
    assert f"{theirs.name}: " in printed
    trace = Trace(tmp_path / "page" / "trace")
    with browser() as chromium:
        page = opened(chromium, tmp_path / "page" / "index.html")
        shown = page.locator("#tokens").inner_text()
        assert shown.startswith("To be, or not to be")
        buttons = page.locator("#strip tbody tr").first.locator("td:nth-child(2) button").all_inner_texts()
        assert buttons == [str(e) for e in trace.experts()[0, 0]]
        assert page.get_by_text("python -m experiments.convert makes").is_visible()
        assert page.get_by_text("No expert is named here").is_visible()
        assert page.said == []


@needs_browser
def test_what_an_engine_recorded_becomes_a_page_of_what_is_known(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permuted(np.tile(np.arange(8), (40, 1)), axis=1)[:, :2] for _ in range(3)], 1)
    np.savez(tmp_path / "r.npz", routed_experts=experts.astype(np.int32))
    records.write_trace(tmp_path / "r.npz", "vllm", tmp_path / "trace", 8)
    _inspect(monkeypatch, capsys, f"trace={tmp_path / 'trace'}", f"out={tmp_path / 'page'}")
    with browser() as chromium:
        page = opened(chromium, tmp_path / "page" / "index.html")
        buttons = page.locator("#strip tbody tr").nth(2).locator("td:nth-child(2)").inner_text()
        assert buttons.split() == [str(e) for e in experts[0, 2]]
        assert not re.search(r"\bnan\b", page.locator("body").inner_text(), re.IGNORECASE)
        assert "%" not in page.locator("#strip").inner_text(), "neither weights nor entropies are known"
        assert page.said == []


def test_without_a_tokenizer_ids_are_shown_and_a_trace_alone_is_enough(runs, tmp_path, monkeypatch, capsys):
    write_trace(tmp_path / "trace", random_routes(160, 1, 4, 2), run=str(tmp_path / "gone"))
    printed = _inspect(monkeypatch, capsys, f"trace={tmp_path / 'trace'}", f"out={tmp_path / 'page'}")
    assert "note: token ids are shown" in printed
    text = (tmp_path / "page" / "index.html").read_text()
    assert "\\u27e8" in text, "⟨7⟩"
    assert "none: ids are shown" in text
    assert "Nothing is known of this model’s training" in text


def test_a_trace_of_another_tokenizer_than_its_runs_is_shown_by_ids(runs, tmp_path, monkeypatch, capsys):
    write_trace(tmp_path / "trace", random_routes(160, 1, 4, 2), run=str(runs / "moe"), tokenizer="another")
    printed = _inspect(monkeypatch, capsys, f"trace={tmp_path / 'trace'}", f"out={tmp_path / 'page'}")
    assert "is another one than the trace's" in printed
    assert "none: ids are shown" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "run=..., hf=... or trace=... is needed"),
        (("run={runs}/moe", "trace=x"), "run and trace are given"),
        (("hf={tmp}",), "out=... is needed with hf=..."),
        (("run={runs}/moe", "stream=true"), "stream=true is of hf=..."),
        (("run={runs}/moe", "probe=-2"), "probe=-2 is out of range"),
        (("trace={tmp}",), "out=... is needed with trace=..."),
        (("trace={tmp}", "out={tmp}/p", "beside=[x]"), "beside=... goes with run=..."),
        (("run={runs}/dense", "out={tmp}/p"), "is a dense model"),
        (("run={runs}/none", "out={tmp}/p"), "none"),
        (("trace={tmp}", "out={tmp}/p"), "is no trace"),
        (("trace={tmp}/other", "out={tmp}/p"), "says nothing of what was traced"),
        (("run={runs}/moe", "out={tmp}/p", "text={tmp}/none.txt"), "none.txt cannot be read"),
        (("run={runs}/moe", "out={tmp}/file/p"), "cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(runs, tmp_path, monkeypatch, capsys, words, sentence):
    import pyarrow.parquet

    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other" / "tokens.parquet")
    shutil.copy(tmp_path / "other" / "tokens.parquet", tmp_path / "other" / "routes.parquet")
    shutil.copy(tmp_path / "other" / "tokens.parquet", tmp_path / "other" / "counts.parquet")
    with pytest.raises(SystemExit, match="2"):
        _inspect(monkeypatch, capsys, *(word.format(runs=runs, tmp=tmp_path) for word in words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "p").exists()
