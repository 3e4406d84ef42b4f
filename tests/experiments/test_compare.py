"""Claims about experiments/compare.py, on two small models trained for a few steps."""

import dataclasses
import inspect
import json
import json.encoder
import pydoc_data.topics
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import compare as command
from experiments.compare import CompareConfig, compare, read_run, settings_of_the_two
from experiments.pages.tables import markdown
from experiments.stats.verdict import HEADINGS, Comparison
from moe.config.parse import to_dict
from moe.config.run import Config, build
from moe.data import loader
from moe.errors import BadInput
from moe.model import cost
from moe.model.transformer import Transformer
from moe.run import checkpoint
from moe.run.jsonl import record
from moe.run.summary import read_summary
from moe.train import loop


def settings(root: Path, **changes) -> dict:
    """A comparison of a few seconds on the corpus under `root`."""
    model = {"name": "tiny", "context": 64, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64}
    tree = {
        "run": str(root / "compare"),
        "model": model | {"moe": {"n_experts": 4, "k": 2, "d_expert": 32}},
        "tokenizer": {"name": "byte"},
        "data": {"name": "text", "path": str(root / "texts"), "val_fraction": 0.2, "cache": str(root / "cache")},
        "optim": {"warmup": 2},
        "train": {"steps": 6, "batch_size": 4, "precision": "fp32", "eval_every": 3, "eval_tokens": 1024, "threads": 1},
    }
    return tree | changes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with texts of two domains."""
    root = tmp_path_factory.mktemp("compare")
    texts = {
        "docs": list(pydoc_data.topics.topics.values())[:30],
        "code": [inspect.getsource(each) for each in (json, json.encoder, textwrap, inspect, subprocess)]
        + [inspect.getsource(each) for each in vars(textwrap.TextWrapper).values() if inspect.isfunction(each)],
    }
    for domain, documents in texts.items():
        (root / "texts" / domain).mkdir(parents=True)
        for i, document in enumerate(documents):
            (root / "texts" / domain / f"{i}.txt").write_text(document)
    return root


@pytest.fixture(scope="module")
def finished(root):
    """The comparison, trained: its config and what it returned."""
    cfg = build(settings(root), CompareConfig)
    return cfg, compare(cfg, say=lambda _: None, overrides=["train.steps=6", "resume=true"])


def summary(cfg: Config, kind: str) -> dict:
    return json.loads(Path(cfg.run, f"{kind}-seed0", "summary.json").read_text())


def test_the_twin_has_the_moes_active_parameters_within_a_percent(finished):
    cfg, _ = finished
    moe, dense = summary(cfg, "moe"), summary(cfg, "dense")
    assert dense["model"]["moe"] is None
    assert dense["params"]["total"] == pytest.approx(moe["params"]["active"], rel=0.01)


def test_both_train_on_the_same_batches_in_the_same_order(root, monkeypatch):
    seen: list[list[int]] = []

    class Recorder(loader.Loader):
        def iterate(self, from_step):
            seen.append([])
            for batch in super().iterate(from_step):
                seen[-1].append(hash(batch.tokens_BS.numpy().tobytes()))
                yield batch

    monkeypatch.setattr("moe.train.loop.Loader", Recorder)
    compare(build(settings(root, run=str(root / "recorded")), CompareConfig), say=lambda _: None)
    moe, dense = (each[:6] for each in seen)
    assert moe == dense
    assert len(set(moe)) == 6


def test_both_start_from_the_weights_they_have_in_common(finished):
    cfg, _ = finished
    weights = []
    for kind in ("moe", "dense"):
        model_cfg = build({"model": summary(cfg, kind)["model"]}).model
        weights.append(dict(Transformer(model_cfg, cfg.router).initialize(cfg.seed).named_parameters()))
    common = {
        name for name in weights[0].keys() & weights[1].keys() if weights[0][name].shape == weights[1][name].shape
    }
    assert {"embed.weight", "norm.weight"} < common
    assert any("attn" in name for name in common)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in common)


def test_both_are_evaluated_on_the_same_windows(finished):
    cfg, _ = finished
    moe, dense = summary(cfg, "moe"), summary(cfg, "dense")
    tokens = [{name: each["tokens"] for name, each in run["val"]["domains"].items()} for run in (moe, dense)]
    assert tokens[0] == tokens[1]
    assert len(moe["val_windows"]) == len(dense["val_windows"]) > 1
    for run in (moe, dense):
        assert sum(run["val_windows"]) / len(run["val_windows"]) == pytest.approx(run["val"]["loss"])


def test_what_is_saved_is_what_is_returned(finished):
    cfg, result = finished
    folder = Path(cfg.run)
    saved = json.loads((folder / "compare.json").read_text())
    assert saved["sentences"] == result.sentences
    assert saved["table"] == result.table
    assert saved["runs"] == {"moe": ["moe-seed0"], "dense": ["dense-seed0"]}
    assert build(saved["config"], CompareConfig) == cfg
    assert (folder / "table.md").read_text() == markdown(HEADINGS, result.table)
    assert result.sentences[0] in (folder / "index.html").read_text().replace("&#39;", "'")
    assert saved["command"] == "python -m experiments.compare train.steps=6"
    for kind in ("moe", "dense"):
        assert checkpoint.latest(folder / f"{kind}-seed0" / "checkpoints", print) is not None


def test_resume_reuses_finished_runs(finished, monkeypatch):
    cfg, result = finished
    files = {path: path.stat().st_mtime_ns for path in Path(cfg.run).glob("*-seed0/**/*") if path.is_file()}
    monkeypatch.setattr(Transformer, "initialize", lambda *_: pytest.fail("a finished run was trained again"))
    again = compare(build(to_dict(cfg) | {"resume": True}, CompareConfig), say=lambda _: None)
    assert again.numbers == result.numbers
    assert again.sentences == result.sentences
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_an_interrupted_comparison_stops_says_how_to_go_on_and_ends_the_same(root, finished, monkeypatch):
    _, result = finished
    tree = settings(root, run=str(root / "interrupted"))
    train, said = command.train, []

    def interrupted(cfg, say):
        if cfg.model.moe is None:
            raise SystemExit(130)
        return train(cfg, say)

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(SystemExit, match="130"):
        compare(build(tree, CompareConfig), said.append, ["run=interrupted"])
    assert said[-1].endswith("python -m experiments.compare run=interrupted resume=true")
    assert not (root / "interrupted" / "compare.json").exists()

    monkeypatch.setattr(command, "train", train)
    again = compare(build(tree | {"resume": True}, CompareConfig), said.append)
    assert again.numbers[0] == result.numbers[0]


def test_each_seed_has_its_pair_and_the_interval_is_over_seeds(root):
    tree = settings(root, run=str(root / "seeds"), seeds=[3, 5])
    tree["train"] |= {"steps": 2, "eval_every": 0}
    result = compare(build(tree, CompareConfig), say=lambda _: None)
    assert result.runs == {"moe": ["moe-seed3", "moe-seed5"], "dense": ["dense-seed3", "dense-seed5"]}
    assert "over 2 seeds)" in result.sentences[0]
    moe = result.numbers[0]["moe"]
    assert moe[0] != moe[1]


def test_the_margin_is_on_the_disk_before_training_and_is_kept(root, monkeypatch):
    tree = settings(root, run=str(root / "declared"), seeds=[0, 1], margin=9.0)
    tree["train"] |= {"steps": 2, "eval_every": 0}
    train, before = command.train, []

    def watched(cfg, say):
        before.append(json.loads((root / "declared" / "declared.json").read_text()))
        return train(cfg, say)

    monkeypatch.setattr(command, "train", watched)
    result = compare(build(tree, CompareConfig), say=lambda _: None)
    assert before == [{"margin": 9.0, "match": "active_params", "seeds": [0, 1]}] * 4
    saved = record(Comparison, json.loads((root / "declared" / "compare.json").read_text()), "compare.json")
    assert saved.judgement == result.judgement
    assert (saved.judgement.n, saved.judgement.margin, saved.judgement.equivalent) == (2, 9.0, True)
    assert saved.judgement.mean == pytest.approx(saved.bits.mean * result.judgement.mean / result.bits.mean)
    assert (saved.sources, set(saved.speedup)) == (["initial weights", "data order"], {"steps", "flops", "seconds"})
    assert saved.text == result.text
    again = tree | {"resume": True}
    assert compare(build(again, CompareConfig), say=lambda _: None).sentences == result.sentences
    for other in (0.01, 0.0):
        with pytest.raises(
            BadInput, match=rf"margin={other:g} is not what was declared before training, margin=9: keep"
        ):
            compare(build(again | {"margin": other}, CompareConfig))
    (root / "declared" / "declared.json").unlink()
    with pytest.raises(BadInput, match=r"margin=9 is not what was declared before training, margin=0"):
        compare(build(again, CompareConfig))


def test_a_comparison_whose_first_run_is_refused_leaves_nothing(root):
    tree = settings(root, run=str(root / "nothing"))
    with pytest.raises(BadInput, match=r"model\.vocab_size=10 is smaller"):
        compare(build(tree | {"model": tree["model"] | {"vocab_size": 10}}, CompareConfig), say=lambda _: None)
    assert not (root / "nothing").exists()


def test_runs_of_another_text_are_refused_before_more_is_trained(finished, tmp_path, monkeypatch):
    cfg, _ = finished
    shutil.copytree(cfg.run, tmp_path / "mixed")
    path = tmp_path / "mixed" / "dense-seed0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "another"}))
    monkeypatch.setattr(command, "train", lambda run_cfg, say: None)
    tree = to_dict(cfg) | {"run": str(tmp_path / "mixed"), "resume": True, "seeds": [0, 1]}
    with pytest.raises(BadInput, match=r"moe-seed0 and dense-seed0 do not have the same text .*cannot be compared"):
        compare(build(tree, CompareConfig), say=lambda _: None)


def test_one_seed_asked_for_equivalence_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "margin=0.01"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert capsys.readouterr().err == (
        "error: margin=0.01 asks for a test of equivalence, which one seed cannot give: name two or more, such as "
        "seeds=[0,1,2], or leave margin 0.\n"
    )


def test_an_existing_folder_is_refused_and_left_alone(finished):
    cfg, _ = finished
    before = Path(cfg.run, "compare.json").read_bytes()
    with pytest.raises(BadInput, match="exists: continue it with resume=true"):
        compare(cfg)
    assert Path(cfg.run, "compare.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "flop"}, "match=flop is not one of active_params, flops, total_params; did you mean flops."),
        ({"seeds": [1, 1]}, "seeds=\\[1, 1\\] names a seed twice"),
        ({"seeds": [-1]}, "seeds=\\[-1\\] has a negative one"),
        ({"margin": -0.01}, r"margin=-0\.01 is out of range: accepted is a finite number of at least 0\."),
        ({"seed_s": [1]}, "seed_s is not a setting; did you mean seeds"),
        ({"model": {"moe": None}}, "model.moe=null leaves nothing to compare"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(root, changes, message):
    with pytest.raises(BadInput, match=message):
        compare(build(settings(root, run=str(root / "refused")) | changes, CompareConfig))
    assert not (root / "refused").exists()


def test_a_twin_that_cannot_match_is_refused_before_anything_is_trained(root, monkeypatch):
    monkeypatch.setattr(cost, "TWIN_TOLERANCE", 1e-6)
    with pytest.raises(BadInput, match="no dense twin of model=tiny comes within"):
        compare(build(settings(root, run=str(root / "refused")), CompareConfig), say=lambda _: None)
    assert not (root / "refused").exists()


def test_the_default_folder_depends_on_what_is_compared(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(command, "train", lambda cfg, say: pytest.fail(cfg.run))
    folders = []
    for changes in ({}, {"match": "flops"}, {"seeds": [0, 1]}, {"log": {"every": 7}}):
        tree = settings(root, run="") | changes
        with pytest.raises(pytest.fail.Exception) as stopped:
            compare(build(tree, CompareConfig), say=lambda _: None)
        folders.append(Path(str(stopped.value)).parent)
    assert len(set(folders)) == 3
    assert folders[0] == folders[3]
    assert folders[0].parent == Path("runs")


def test_the_table_says_how_even_the_load_is_and_what_was_skipped_and_dropped(finished):
    _, result = finished
    layers = json.loads((Path(result.folder) / "moe-seed0" / "summary.json").read_text())["load"]["routing"]
    own = {label: cells for label, *cells in result.table}
    for label, name, factor in (
        ("MaxVio of the expert load (0 is even)", "max_vio", 1),
        ("Tokens without an expert (%)", "skipped", 100),
    ):
        shown, *others = own[label]
        assert float(shown) == pytest.approx(factor * sum(each[name] for each in layers) / len(layers), abs=0.051)
        assert others == ["", ""]
    assert own["Rows dropped in training (%)"] == ["0.0", "", ""]


def test_the_leak_is_measured_and_one_is_said(root, finished):
    _, result = finished
    assert result.leak < 1e-9
    assert "Causal leak (logits)" in [label for label, *_ in result.table]
    assert not any("sees later tokens" in each for each in result.sentences)
    tree = settings(root, run=str(root / "leaking"), router={"name": "expert-choice"}, balance={"aux": 0.0})
    tree["train"] |= {"steps": 2, "eval_every": 0}
    again = compare(build(tree, CompareConfig), say=lambda _: None)
    assert again.leak > 1e-6
    assert "No verdict: the router sees later tokens (" in again.sentences[0]
    assert again.by_seed[0].moe.leak == again.leak > again.by_seed[0].dense.leak


def test_all_runs_have_the_precision_that_the_first_one_measured(root, tmp_path, monkeypatch):
    """bf16 is the faster one while the MoE is asked about, and never again."""
    answers = iter([("bf16", "it is faster")])
    asked = lambda cfg, device: (cfg.train.precision, "as asked") if cfg.train.precision != "auto" else next(answers)
    monkeypatch.setattr(loop, "choose_precision", asked)
    tree = settings(root, run=str(tmp_path / "compare"), seeds=[0, 1])
    tree["train"] |= {"steps": 2, "precision": "auto", "eval_every": 0, "eval_tokens": 256}
    compare(build(tree, CompareConfig), say=lambda _: None)
    found = {path.parent.name: read_summary(path.parent).precision for path in tmp_path.glob("compare/*/summary.json")}
    assert found == dict.fromkeys(("moe-seed0", "dense-seed0", "moe-seed1", "dense-seed1"), "bf16")


def test_a_router_of_no_fixed_number_is_matched_in_flops_by_measured_rows_alone(root, tmp_path):
    tree = settings(root, run=str(tmp_path / "compare"), match="flops", router={"name": "threshold"})
    with pytest.raises(
        BadInput, match=r"router\.name=threshold.*choose match=active_params or total_params, or set rows"
    ):
        compare(build(tree, CompareConfig), say=lambda _: None)
    assert not (tmp_path / "compare").exists()
    cfg = build(tree | {"rows": 1.5}, CompareConfig)
    model = dataclasses.replace(cfg.model, vocab_size=257)
    moe, dense = settings_of_the_two(cfg, model)
    wanted = cost.flops(moe.model, cfg.router, rows=1.5).forward
    assert cost.flops(dense.model).forward == pytest.approx(wanted, rel=0.01)


def test_comparisons_share_the_twins_of_one_size(root):
    tree = settings(root, twins=str(root / "twins"))
    tree["train"] |= {"steps": 2, "eval_every": 0}
    said, twins, results = [], [], []
    for i, (router, k) in enumerate((("softmax", 2), ("sigmoid", 2), ("softmax", 1))):
        own = {"run": str(root / f"sharing{i}"), "router": {"name": router, "renormalize": False}}
        own |= {"balance": {"aux": 0.0, "z": 0.0}, "model": tree["model"] | {"moe": tree["model"]["moe"] | {"k": k}}}
        results.append(compare(build(tree | own, CompareConfig), said.append))
        twins.append({path.name for path in (root / "twins").iterdir()})
    assert [len(each) for each in twins] == [1, 1, 2]
    assert [each.runs["moe"] for each in results] == [["moe-seed0"]] * 3
    dense = [each.runs["dense"][0] for each in results]
    assert dense[0] == dense[1] == f"../twins/{twins[0].pop()}" != dense[2]
    assert results[0].twin == results[1].twin != results[2].twin
    assert results[0].by_seed[0].dense == results[1].by_seed[0].dense
    assert sum(line.endswith("is finished") and "twins" in line for line in said) == 1


def test_a_sweeps_jobs_have_folders_of_their_own_and_twins_beside_them(root):
    cfg = build(settings(root, run=""), CompareConfig)
    place = lambda each: command.place_in_sweep(each, "sweep-router-1234", "gshard")
    one, path = place(cfg)
    assert one.run == str(path)
    assert one.run.startswith("runs/sweep-router-1234/gshard-")
    assert one.twins == "runs/sweep-router-1234/twins"
    own = dataclasses.replace(cfg, run="here/a", twins="there")
    assert place(own) == (own, Path("here/a"))
    # The same comparison whatever it is compared with, and wherever its twin is.
    others = [{"match": "flops", "twins": "elsewhere"}, {"twins": "elsewhere"}, {"baseline": "hash"}]
    runs = [place(dataclasses.replace(cfg, **changes))[1] for changes in ({}, *others)]
    assert (runs[0] == runs[2] == runs[3], runs[0] == runs[1]) == (True, False)


def sweep(monkeypatch, root, tmp_path, *given) -> int:
    """Run a sweep of two steps; the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    words = ["tokenizer=byte", "data=text", f"data.path={root / 'texts'}", "data.val_fraction=0.2"]
    words += [f"data.cache={root / 'cache'}", "model=cpu-nano", "model.context=32", "model.d_model=16", "model.d_ff=32"]
    words += ["train.steps=2", "train.batch_size=2", "train.eval_tokens=512", "train.threads=1", "train.precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["compare", "-m", *words, "optim.warmup=1", *given])
    GlobalHydra.instance().clear()
    try:
        command.main()
    except SystemExit as end:
        return end.code
    return 0


def labels_of(table: Path) -> list[str]:
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    return sorted(line.split("|")[1].strip() for line in lines[2:])


def test_a_sweep_ends_in_one_table_and_announces_every_job(root, monkeypatch, capsys, tmp_path):
    for again in ([], ["resume=true"]):  # the second time everything is there
        assert sweep(monkeypatch, root, tmp_path, "router=softmax,sigmoid", "seed=0,1", *again) == 0
        out = capsys.readouterr().out
        (folder,) = (tmp_path / "runs").iterdir()
        assert f"\n{(folder / 'table.md').read_text()}table: runs/{folder.name}/table.md\n" in out
        assert labels_of(folder / "table.md") == ["dense twin", "sigmoid", "softmax"]
        announced = [line for line in out.splitlines() if line.startswith("job ")]
        assert announced[0] == "job 1 of 4: router=softmax seed=0"
        assert announced[3] == "job 4 of 4: router=sigmoid seed=1"
    assert folder.name.startswith("sweep-router-seed-")
    names = sorted(path.name.rpartition("-")[0] for path in folder.iterdir() if path.is_dir())
    assert names == ["", "sigmoid-seed0", "sigmoid-seed1", "softmax-seed0", "softmax-seed1"]
    assert len(list((folder / "twins").iterdir())) == 2


def test_another_sweep_leaves_the_table_of_the_first(root, monkeypatch, tmp_path):
    for routers in ("softmax,softmax-raw", "softmax,sigmoid"):
        assert sweep(monkeypatch, root, tmp_path, f"router={routers}", "train.steps=1") == 0
    tables = [labels_of(path) for path in (tmp_path / "runs").glob("*/table.md")]
    assert sorted(tables) == [["dense twin", "sigmoid", "softmax"], ["dense twin", "softmax", "softmax-raw"]]


def test_a_job_that_fails_is_named_at_the_end_and_the_others_make_the_table(root, monkeypatch, capsys, tmp_path):
    train = command.train

    def failing(cfg, say):
        if cfg.router.name == "hash":
            raise BadInput("step 3: the loss is not finite.")
        return train(cfg, say)

    monkeypatch.setattr(command, "train", failing)
    given = ("router=hash,softmax,sigmoid", "baseline=sigmoid")
    for again in ([], ["resume=true"]):
        assert sweep(monkeypatch, root, tmp_path, *given, *again) == 2
        printed = capsys.readouterr()
        assert printed.err == (
            "error: step 3: the loss is not finite.\n"
            "error: 1 of 3 jobs failed:\n"
            "  job 1 of 3 (router=hash): step 3: the loss is not finite.\n"
        )
        (table,) = (tmp_path / "runs").glob("*/table.md")
        assert labels_of(table) == ["dense twin", "sigmoid", "softmax"]
        assert "Against sigmoid" in table.read_text()


def test_a_baseline_that_no_line_is_called_by_is_refused_before_the_first_job(root, monkeypatch, capsys, tmp_path):
    assert sweep(monkeypatch, root, tmp_path, "router=softmax,hash", "baseline=hasch") == 2
    assert capsys.readouterr().err == "error: baseline=hasch is no line of this sweep's table; did you mean hash.\n"
    assert not (tmp_path / "runs").exists()


def test_the_command_line_refuses_a_misspelt_key_and_names_the_right_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "mach=flops"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert capsys.readouterr().err == "error: mach is not a setting; did you mean match.\n"


def test_the_command_line_prints_the_table_the_verdict_and_where_the_page_is(finished, monkeypatch, capsys):
    cfg, result = finished
    given = [f"run={cfg.run}", "resume=true", "tokenizer=byte", "data=text", f"data.path={cfg.data.path}"]
    given += [f"data.{key}={getattr(cfg.data, key)}" for key in ("val_fraction", "cache")]
    given += [
        f"model.{key}={getattr(cfg.model, key)}"
        for key in ("name", "context", "n_layers", "d_model", "n_heads", "d_ff")
    ]
    given += ["model.qk_norm=none", "model.moe.n_experts=4", "model.moe.k=2", "model.moe.d_expert=32", "optim.warmup=2"]
    given += [f"train.{key}={getattr(cfg.train, key)}" for key in ("steps", "batch_size", "precision", "threads")]
    given += [f"train.{key}={getattr(cfg.train, key)}" for key in ("eval_every", "eval_tokens")]
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["compare", *given])
    command.main()
    out = capsys.readouterr().out
    assert markdown(HEADINGS, result.table) in out
    assert "\n".join(result.sentences) in out
    assert out.endswith(f"page: {cfg.run}/index.html\n")


def test_a_run_that_ended_without_a_finite_loss_is_refused_in_a_sentence(finished, tmp_path):
    cfg, _ = finished
    folder = tmp_path / "diverged"
    shutil.copytree(Path(cfg.run, "moe-seed0"), folder)
    tree = json.loads((folder / "summary.json").read_text())
    tree["val"]["loss"] = None
    (folder / "summary.json").write_text(json.dumps(tree))
    with pytest.raises(BadInput, match=r"diverged ended with a validation loss that is not finite"):
        read_run(folder)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("router.name=softmax,nothing_there:Router", "router.name=nothing_there:Router cannot be imported"),
        ("distill.teacher='',nowhere", "distill.teacher=nowhere is not a run's folder"),
    ],
)
def test_a_job_that_cannot_train_is_refused_before_the_first(wrong, sentence, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("a job was trained"))
    monkeypatch.setattr(command, "prepare", lambda *_: pytest.fail("the text was read"))
    monkeypatch.setattr(sys, "argv", ["compare.py", "-m", "seed=0,1", wrong])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="2"):
        command.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {sentence}")
    assert printed.err.count("\n") == 1
