"""Claims about `python -m experiments.upcycle`: what the new run holds, that it trains on, and what is refused."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import experiments.upcycle
from experiments.upcycle import UpcycleConfig, place_in_sweep
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.run import checkpoint
from moe.run.folder import read_config
from moe.run.jsonl import read_lines
from moe.run.load import load_run
from tests.small_runs import files, settings, train

TOKENS_BS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(1))


def assert_same(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def dense_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    train(settings(corpus, folder, {"model.moe": None}))
    return folder


@pytest.fixture
def command(dense_run, tmp_path, monkeypatch, capsys):
    """(arguments) -> (the new run's folder, exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, source=dense_run):
        monkeypatch.setattr(sys, "argv", ["upcycle.py", f"source={source}", f"run={tmp_path / 'new'}", *arguments])
        GlobalHydra.instance().clear()
        status = 0
        with mock.patch("os.fsync"):
            try:
                experiments.upcycle.main()
            except SystemExit as end:
                status = end.code
        return tmp_path / "new", status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "moe", "router"),
    [
        ((), MoEConfig(8, 2, 48), "softmax"),
        (
            ("method=split", "model.moe.k=3", "model.moe.n_experts=6", "model.moe.d_expert=16"),
            MoEConfig(6, 3, 16),
            "softmax",
        ),
        (("router=sigmoid", "train.steps=9"), MoEConfig(8, 2, 48), "sigmoid"),
    ],
)
def test_an_upcycled_run_starts_as_the_dense_model_and_trains_on(arguments, moe, router, command, dense_run):
    before = files(dense_run)
    folder, status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert out.endswith(f"python -m experiments.train run={folder} resume=true\n")
    assert files(dense_run) == before
    assert sorted(each.name for each in folder.iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]
    cfg, old = read_config(folder), read_config(dense_run)
    assert cfg.model == dataclasses.replace(old.model, moe=moe)
    assert (cfg.router.name, cfg.optim, cfg.data, cfg.seed) == (router, old.optim, old.data, old.seed)
    snapshot = checkpoint.load(folder / "checkpoints" / "step-00000000")
    assert (snapshot.step, snapshot.optimizer) == (0, {})
    (dense, _, _), (new, _, _) = load_run(dense_run), load_run(folder, "last")
    assert_same(new.double()(TOKENS_BS).logits_BSV, dense.double()(TOKENS_BS).logits_BSV, 1e-5)
    cfg.resume = True
    summary = train(cfg)
    assert summary.steps == cfg.train.steps == (9 if "train.steps=9" in arguments else old.train.steps)
    lines, own = read_lines(folder / "metrics.jsonl"), read_lines(dense_run / "metrics.jsonl")
    best = min(each["val"]["loss"] for each in own if "val" in each and each["step"] in (3, 6, 7))
    assert lines[0]["step"] == 0
    assert lines[0]["val"]["loss"] == pytest.approx(best, abs=1e-4)


def test_a_router_brings_its_own_k_and_balance(command):
    folder, status, _, _ = command("router=switch", "model.moe.n_experts=4")
    cfg = read_config(folder)
    assert status == 0
    assert (cfg.model.moe.n_experts, cfg.model.moe.k, cfg.router.jitter) == (4, 1, 0.01)
    assert cfg.balance.capacity > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run=", "run=... is needed"),
        ("source=", "source=... is needed"),
        ("source=nowhere", "run=nowhere is not a run's folder"),
        ("method=clone", "method=clone is not one of copy, noise, split, drop, merge, grow, prune, dense."),
        ("method=merge", "others=[] with method=merge: others and method=merge go together."),
        ("others=[runs/a]", "others=['runs/a'] with method=copy: others and method=merge go together."),
        ("method=prune", "is a dense run: choose an MoE for method=prune."),
        ("method=dense", "is a dense run: choose an MoE for method=dense."),
        ("method=split", "method=split needs model.moe.d_expert=..., a part of the dense model's d_ff=48."),
        ("noise=0.1", "noise=0.1 means nothing to method=copy: set method=noise or grow."),
        ("drop=2", "drop=2.0 must be"),
        ("model.d_ff=64", "model.d_ff cannot be given"),
        ("model=cpu-nano", "model cannot be given"),
        ("model.moe.n_shared=1", "model.moe.n_shared=1: a shared expert would add"),
        ("model.moe.k=9", "model.moe.k=9 exceeds model.moe.n_experts=8"),
        ("which=step-5", "which=step-5 is not one of"),
        ("tokenizer=char", "has another tokenizer"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_leaves_nothing(argument, message, command, tmp_path):
    _, status, _, err = command(argument)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_and_a_source_with_experts_are_refused(command):
    folder, status, _, _ = command()
    before = files(folder)
    assert status == 0
    _, status, _, err = command()
    assert (status, err) == (2, f"error: run={folder} exists: choose another folder.\n")
    assert files(folder) == before
    other = folder.rename(folder.with_name("other"))
    _, status, _, err = command("which=last", source=other)
    assert (status, err) == (2, f"error: source={other} is an MoE: choose a dense run for method=copy.\n")


@pytest.fixture(scope="module")
def moe_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "run"
    train(settings(corpus, folder))
    return folder


def logits_of(folder, which="last"):
    return load_run(folder, which)[0].double()(TOKENS_BS).logits_BSV


def trained_on(folder):
    """The summary of the run, trained."""
    cfg = read_config(folder)
    cfg.resume = True
    return train(cfg)


def test_a_grown_run_has_twice_the_experts_and_with_twice_the_k_the_same_function(command, moe_run):
    folder, status, _, err = command("method=grow", "model.moe.k=4", "which=last", source=moe_run)
    assert (status, err) == (0, "")
    cfg, old = read_config(folder), read_config(moe_run)
    assert (cfg.model.moe.n_experts, cfg.model.moe.k, old.model.moe.n_experts, old.model.moe.k) == (8, 4, 4, 2)
    assert_same(logits_of(folder), logits_of(moe_run), 1e-5)
    assert trained_on(folder).steps == old.train.steps


def test_noise_makes_the_grown_experts_differ_in_their_routing(command, moe_run):
    folder, status, _, _ = command("method=grow", "noise=0.5", "which=last", source=moe_run)
    rows_ED = load_run(folder, "last")[0].routers()[0].w_ED
    assert status == 0
    assert torch.equal(rows_ED[:4], load_run(moe_run, "last")[0].routers()[0].w_ED)
    assert not torch.allclose(rows_ED[4:], rows_ED[:4], rtol=1e-2)


def test_a_pruned_run_keeps_the_experts_that_its_validation_used_most(command, moe_run):
    folder, status, _, err = command("method=prune", "model.moe.n_experts=3", "which=last", source=moe_run)
    assert (status, err) == (0, "")
    new, old = (load_run(each, "last")[0] for each in (folder, moe_run))
    load = json.loads((moe_run / "summary.json").read_text())["load"]
    for layer in (0, 1):
        counts_E = np.array(load["counts"][layer]).sum(0)
        kept = sorted(np.argsort(-counts_E, kind="stable")[:3].tolist())
        mine, theirs = (model.blocks[layer].mlp for model in (new, old))
        assert torch.equal(mine.experts.w_up_EFD, theirs.experts.w_up_EFD[kept])
        assert torch.equal(mine.router.w_ED, theirs.router.w_ED[kept])
    assert trained_on(folder).model["moe"]["n_experts"] == 3


def test_an_moe_becomes_a_dense_run_that_learns_from_it(command, moe_run):
    teacher = f"distill.teacher={moe_run}"
    folder, status, _, err = command("method=dense", teacher, "distill.weight=0.5", "train.steps=30", source=moe_run)
    assert (status, err) == (0, "")
    cfg = read_config(folder)
    assert (cfg.model.moe, cfg.model.d_ff, cfg.distill.teacher) == (None, 2 * 16, str(moe_run))
    assert cfg.router == RouterConfig()
    trained_on(folder)
    assert all("distill" in line for line in read_lines(folder / "metrics.jsonl")[1:])


def test_dense_runs_become_one_moe_with_an_expert_of_each(command, dense_run, corpus, tmp_path):
    other = tmp_path / "other"
    train(settings(corpus, other, {"model.moe": None, "seed": 1, "train.steps": 2, "checkpoint.every": 0}))
    folder, status, out, err = command("method=merge", f"others=[{other}]", "which=last")
    assert (status, err) == (0, "")
    assert f"by method=merge from {dense_run}, {other}. Train it" in out
    model = load_run(folder, "last")[0]
    for e, each in enumerate((dense_run, other)):
        up = load_run(each, "last")[0].blocks[1].mlp.up.weight
        assert torch.equal(model.blocks[1].mlp.experts.w_up_EFD[e], up)
    assert trained_on(folder).model["moe"]["n_experts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("method=prune", "model.moe.n_experts=5"), "keep has 4 experts for layer 0, and the target has 5 there."),
        (("method=prune", "model.moe.n_experts=1"), "model.moe.k=2 exceeds model.moe.n_experts=1"),
        (
            ("method=grow", "model.moe.n_experts=6"),
            "the target's 6 experts in layer 0 are no multiple of the source's 4",
        ),
        (("method=dense", "model.moe.k=1"), "model.moe.k cannot be given"),
        (("method=dense", "router=sigmoid"), "router cannot be given: method=dense leaves no router."),
        (("method=merge", "others=[runs/a]"), "is an MoE: choose a dense run for method=merge."),
    ],
)
def test_what_an_moe_cannot_become_is_refused_in_one_sentence(arguments, message, command, moe_run, tmp_path):
    _, status, _, err = command(*arguments, source=moe_run)
    assert (status, err.startswith("error: "), err.count("\n")) == (2, True, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_experts_of_a_run_that_was_never_validated_cannot_be_pruned(command, moe_run, tmp_path):
    unfinished = shutil.copytree(moe_run, tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    folder, status, _, err = command("method=prune", source=unfinished)
    assert (status, folder.exists()) == (2, False)
    assert err == f"error: source={unfinished} is not finished: which experts are busy is in its summary.json.\n"


def test_the_jobs_of_a_sweep_have_folders_in_the_one_that_is_named():
    cfg = UpcycleConfig(source="runs/a", run="runs/new")
    placed, path = place_in_sweep(cfg, "sweep-method-1234", "copy")
    assert (placed.run, path, cfg.run) == ("runs/new/copy", Path("runs/new/copy"), "runs/new")
