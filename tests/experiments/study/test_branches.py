"""Claims about the runs of branch-train-mix: equal FLOPs, what merging keeps, what a second call repeats."""

import shutil
from unittest import mock

import pytest
import torch

from experiments.study.branches import ARMS, CONTROLS, plan, run_seed, tensors_of
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.run.folder import read_config
from moe.run.load import load_run
from moe.run.summary import read_summary
from tests.small_runs import files, settings, silent

DOMAINS = ["algebra", "botany", "chess"]
CHANGES = {"model.d_ff": 24, "train.steps": 12, "train.eval_every": 0, "optim.lr": 0.02, "checkpoint.every": 0}


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    """(plan, folder, text, the runs' folders by name) of one seed, finished."""
    cfg = settings(corpus, "unused", CHANGES)
    dataset = prepare(cfg.data, cfg.tokenizer, silent)
    planned = plan(cfg, dataset.domains, dataset.tokenizer.vocab_size, copy_steps=15, mix_steps=6)
    folder = tmp_path_factory.mktemp("branches")
    with mock.patch("os.fsync"):
        return planned, folder, dataset, run_seed(planned, 3, folder, dataset, silent)


def summary(study, name):
    return read_summary(study[3][name])


def test_every_control_has_cost_the_flops_of_all_stages_of_the_mix_to_half_a_step(study):
    """By what finished runs say of themselves, stage by stage."""
    cost = lambda *names: sum(s.flops.training * s.tokens for s in (summary(study, name) for name in names))
    total = cost("dense", *(f"copy-{domain}" for domain in DOMAINS), "mixed")
    for name, before in (("upcycled", ["dense"]), ("scratch", []), ("continued", ["dense"])):
        step = summary(study, name).flops.training * summary(study, name).tokens / summary(study, name).steps
        assert abs(cost(*before, name) - total) <= step / 2, name
        assert study[0].flops[name] == cost(*before, name)
    assert study[0].flops["mixed"] == total
    assert study[0].flops["merged"] == total - cost("mixed")


def test_a_copy_reads_one_domain_and_gains_on_it_alone(study):
    before = summary(study, "dense")
    for domain in DOMAINS:
        assert read_config(study[3][f"copy-{domain}"]).data.domains == [domain]
        after = summary(study, f"copy-{domain}")
        assert list(after.val.domains) == [domain]
        assert after.tokenizer == before.tokenizer
        assert after.val.domains[domain].loss < before.val.domains[domain].loss


def test_no_stage_reads_the_batches_of_the_one_before_it(study):
    seeds = [read_config(study[3][name]).data_seed() for name in ("dense", *(f"copy-{d}" for d in DOMAINS), "mixed")]
    assert len(set(seeds)) == len(seeds)
    assert {read_config(study[3][name]).data_seed() for name in ("routed", "upcycled", "continued")} == {seeds[-1]}


def test_experts_of_the_merged_model_are_the_copies_and_all_else_is_their_mean(study):
    copies = [tensors_of(study[3][f"copy-{domain}"]) for domain in DOMAINS]
    merged = tensors_of(study[3]["merged"])
    for i, tensors in enumerate(copies):
        assert torch.equal(merged["blocks.0.mlp.experts.w_up_EFD"][i], tensors["blocks.0.mlp.up.weight"])
    names = [name for name in merged if ".mlp." not in name]
    assert any("attention" in name or "qkv" in name or ".q" in name for name in names)
    for name in names:
        mean = sum(tensors[name].double() for tensors in copies) / len(copies)
        torch.testing.assert_close(merged[name].double(), mean, rtol=1e-6, atol=1e-7)


def test_the_indifferent_model_is_the_mean_of_the_copies_mlps_in_every_layer(study):
    """Against a dense model whose every MLP is replaced, in float64, by the mean of what the copies' MLPs give."""
    uniform = load_run(study[3]["uniform"], "last")[0].double()
    models = [load_run(study[3][f"copy-{domain}"], "last")[0].double() for domain in DOMAINS]
    oracle = load_run(study[3]["average"], "last")[0].double()

    for layer, block in enumerate(oracle.blocks):
        mlps = [model.blocks[layer].mlp for model in models]
        block.mlp.forward = lambda x, mlps=mlps: sum(mlp(x) for mlp in mlps) / len(mlps)
    tokens_BS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = (model(tokens_BS, backend="reference").logits_BSV for model in (uniform, oracle))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_training_the_router_alone_changes_nothing_else_to_the_bit(study):
    before, after, mixed = (tensors_of(study[3][name]) for name in ("merged", "routed", "mixed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".router." in name for name in changed)
    assert {name for name in before if not torch.equal(before[name], mixed[name])} > changed


def test_all_runs_are_there_and_a_second_call_repeats_none(study):
    planned, folder, dataset, runs = study
    assert [name for name in runs if not name.startswith("copy-")] == list(ARMS)
    assert set(CONTROLS) < set(runs)
    before = files(folder)
    assert run_seed(planned, 3, folder, dataset, silent) == runs
    assert files(folder) == before


def test_a_run_that_is_gone_is_made_again_alike_and_no_other(study):
    planned, folder, dataset, runs = study
    weights, others = (
        tensors_of(runs["routed"]),
        lambda: {name: content for name, content in files(folder).items() if not name.startswith("routed/")},
    )
    before = others()
    shutil.rmtree(runs["routed"])
    with mock.patch("os.fsync"):
        run_seed(planned, 3, folder, dataset, silent)
    again = tensors_of(runs["routed"])
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert others() == before


def test_other_settings_in_the_same_folder_are_refused_in_a_sentence(study, corpus):
    cfg = settings(corpus, "unused", CHANGES | {"optim.lr": 0.01})
    planned = plan(cfg, DOMAINS, study[2].tokenizer.vocab_size, 15, 6)
    with pytest.raises(BadInput, match=r"optim\.lr=0\.01 differs from the run's own 0\.02"):
        run_seed(planned, 3, study[1], study[2], silent)
    cfg = settings(corpus, "unused", CHANGES | {"balance.z": 0.5})
    planned = plan(cfg, DOMAINS, study[2].tokenizer.vocab_size, 15, 6)
    with pytest.raises(BadInput, match=r"z=0\.5 differs .* go on with .*uniform,"):  # before any run starts from it
        run_seed(planned, 3, study[1], study[2], silent)


@pytest.mark.parametrize(
    ("changes", "domains", "sentence"),
    [
        ({}, ["algebra"], r"data has 1 domain \(algebra\): a model for each needs two or more"),
        ({"model.moe": None}, DOMAINS, r"model\.moe=null: the copies have to become experts"),
        ({"router.name": "threshold"}, DOMAINS, "a token takes as many experts as it likes"),
    ],
)
def test_what_has_no_branches_is_refused(corpus, changes, domains, sentence):
    with pytest.raises(BadInput, match=sentence):
        plan(settings(corpus, "unused", changes), domains, 300, 5, 5)
