"""Settings: what is refused, with which words, and what identifies a run."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe.config import parse
from moe.config.run import Config, build, fingerprint
from moe.errors import BadInput
from tests.moe.config.refusals import fields, refusal, tree

ROOT = Path(__file__).parents[3]

IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "the state of no source": ({"source_state": "all"}, "source_state=all needs source"),
    "no room for the tokens that enter": (
        {"model.moe.depth": 0.01, "balance.capacity": 0.01, "train.batch_size": 1, "model.moe.depth_every": 1},
        "leaves no expert room for one token: with 3 tokens",
    ),
    "a tile that leaves nothing": (
        {"balance.tile": 2048, "model.moe.k": 2, "train.batch_size": 8, "model.context": 128},
        "balance.tile=2048 is more than twice the 128 rows of an expert in a micro-batch",
    ),
    "weights on the input of experts with biases": (
        {"model.moe.weigh_input": True, "model.expert_bias": True},
        "model.moe.weigh_input=true takes experts without biases",
    ),
    "weights on the input of experts that cost nothing": (
        {"model.moe.weigh_input": True, "model.moe.n_null": 2},
        "model.moe.weigh_input=true takes real experts alone; 2 of them cost nothing",
    ),
    "a limit of an activation without one": (
        {"model.swiglu_limit": 5.0},
        "model.swiglu_limit=5.0 means nothing to model.activation=swiglu: leave it 7.0.",
    ),
    "capacity below one token": (
        {"balance.capacity": 1e-6},
        "balance.capacity=1e-06 leaves no expert room for one token",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)


def test_a_command_may_extend_the_settings():
    @dataclass
    class Bench(Config):
        repeats: int = 3

    assert build({"repeats": 5, "seed": 2}, Bench) == Bench(seed=2, repeats=5)
    with pytest.raises(BadInput, match="repeat is not a setting; did you mean repeats"):
        build({"repeat": 5}, Bench)


NOT_IN_FINGERPRINT = {"run", "resume", "trust", "data.cache", "data.workers", "data.on_error"}
NOT_IN_FINGERPRINT |= {f"parallel.{name}" for name in ("replicate", "shard", "ep", "timeout")}


def _other(value):
    """A different value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, "x"]
        case dict():
            return value | {"x": [1.0]}
    raise AssertionError(value)


@pytest.mark.parametrize("path", fields(Config))
def test_the_fingerprint_sees_what_decides_the_result_and_nothing_else(path):
    cfg = build(tree({"model.latent": {}}))
    before = fingerprint(cfg)
    group, _, key = path.rpartition(".")
    owner = parse.lookup(cfg, group) if group else cfg
    setattr(owner, key, _other(getattr(owner, key)))
    ignored = path in NOT_IN_FINGERPRINT or path.startswith("log.")
    assert (fingerprint(cfg) == before) == ignored


def test_a_fingerprint_is_eight_hex_digits_and_the_same_in_every_process():
    code = "from moe.config.run import build, fingerprint; print(fingerprint(build({})))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()
    assert elsewhere == fingerprint(build({}))
    assert len(bytes.fromhex(elsewhere)) == 4


def test_settings_that_were_added_leave_the_names_of_older_runs_alone():
    assert fingerprint(build({})) == "c378cac9", "a new setting belongs among YOUNGER"
    assert fingerprint(build({"source": "runs/other"})) != "c378cac9"
    assert fingerprint(build({"model": {"moe": {}}})) == "4fedac4e", "also of models with experts"
    assert fingerprint(build({"model": {"moe": {"last_dense": 1}}})) != "4fedac4e"


def test_a_warm_up_names_the_same_run_given_or_derived():
    """Runs from before it was derived have a number of steps, and keep their folders' names."""
    assert fingerprint(build({"optim": {"warmup": 50}})) == "c378cac9"
    short = {"train": {"steps": 30}}
    assert fingerprint(build(short)) == fingerprint(build(short | {"optim": {"warmup": 3}}))
    assert fingerprint(build(short)) != fingerprint(build(short | {"optim": {"warmup": 30}}))


def test_seeds_of_weights_and_batches_follow_the_seed_unless_given():
    both, fixed = build({"seed": 3}), build({"seed": 3, "seed_init": 0, "seed_data": 5})
    assert (both.init_seed(), both.data_seed()) == (3, 3)
    assert (fixed.init_seed(), fixed.data_seed()) == (0, 5)
    assert fingerprint(build({"seed_init": -1, "seed_data": -1})) == "c378cac9"
    names = {fingerprint(build(tree)) for tree in ({}, {"seed_init": 0}, {"seed_data": 0}, {"seed": 1})}
    assert len(names) == 4
    with pytest.raises(BadInput, match=r"seed_init=-2 is out of range"):
        build({"seed_init": -2})


def test_a_setting_that_a_command_adds_may_be_younger_too():
    @dataclass
    class Bench(Config):
        repeats: int = 3

    assert fingerprint(Bench(), younger=("repeats",)) == fingerprint(build({}))
    assert fingerprint(Bench(repeats=4), younger=("repeats",)) != fingerprint(build({}))


def test_the_settings_import_neither_torch_nor_hydra():
    code = (
        "import sys, moe.config.run\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'hydra', 'omegaconf', 'numpy', 'yaml'}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        == "[]\n"
    )


def test_defaults_are_not_shared_between_configurations():
    build({}).data.domains.append("drama")
    assert build({}).data.domains == []
