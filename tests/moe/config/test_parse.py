"""A nested dict into dataclasses and back: what is refused, with which words."""

import math

import pytest

from moe.config import parse
from moe.config.parse import Between, OneOf, accepted, to_dict
from moe.config.router import ROUTERS
from moe.config.run import Config, build
from moe.errors import BadInput
from tests.moe.config.refusals import fields, refusal, tree

MISSPELT = {  # path of the misspelt key: the key meant
    "sead": "seed",
    "despatch": "dispatch",
    "modle": "model",
    "optimm": "optim",
    "model.n_layer": "model.n_layers",
    "model.dmodel": "model.d_model",
    "model.rope_thetta": "model.rope_theta",
    "model.tie_embedding": "model.tie_embeddings",
    "model.moe.n_expert": "model.moe.n_experts",
    "model.moe.d_experts": "model.moe.d_expert",
    "model.moe.first_dens": "model.moe.first_dense",
    "router.renormalise": "router.renormalize",
    "router.selection_bais": "router.selection_bias",
    "balance.auxx": "balance.aux",
    "balance.biasrate": "balance.bias_rate",
    "tokenizer.vocab_sizes": "tokenizer.vocab_size",
    "data.max_md": "data.max_mb",
    "data.val_frac": "data.val_fraction",
    "data.clean.min_char": "data.clean.min_chars",
    "optim.weight_decy": "optim.weight_decay",
    "train.batchsize": "train.batch_size",
    "train.acumulate": "train.accumulate",
    "checkpoint.keeep": "checkpoint.keep",
    "log.tensor_board": "log.tensorboard",
}
WRONG_TYPES = {
    "seed": 1.5,
    "resume": "yes",
    "run": 3,
    "model.n_layers": "four",
    "model.d_model": 64.0,
    "model.bias": 1,
    "model.norm_eps": "small",
    "model.name": None,
    "model.moe.k": True,
    "router.scale": False,
    "balance.aux": [0.1],
    "data.domains": "drama",
    "data.domains[1]": ["drama", 3],
    "optim.betas[0]": ["a", 0.9],
    "optim.lr": None,
    "train.compile": "true",
    "model": "gpt2",
    "router": None,
    "model.moe": 8,
    "data.clean": [],
}
NOT_A_CHOICE = {  # value, and the choice it is nearest to
    "source_state": ("weight", "weights"),
    "data.on_error": ("skips", "skip"),
    "dispatch": ("tritonn", "triton"),
    "objective.name": ("gpro", "grpo"),
    "objective.loss": ("sigmoid_nrm", "sigmoid_norm"),
    "objective.normalize": ("dr_gpo", "dr_grpo"),
    "objective.reward": ("exat", "exact"),
    "objective.draw_dispatch": ("torc", "torch"),
    "objective.draw_precision": ("bf32", "fp32"),
    "model.activation": ("swigl", "swiglu"),
    "model.norm": ("rmss", "rms"),
    "model.position": ("ropee", "rope"),
    "model.qk_norm": ("heads", "head"),
    "model.norm_at": ("afer", "after"),
    "model.attn_bias": ("qkvo", "qkv"),
    "model.rope_scaling.type": ("yarm", "yarn"),
    "model.moe.precision": ("pf8", "fp8"),
    "model.moe.depth_causal": ("predict", "predictor"),
    "router.name": ("soft-max", "softmax"),
    "router.logits": ("cos", "cosine"),
    "router.precision": ("fp32s", "fp32"),
    "router.second": ("rand", "random"),
    "router.gradient": ("straight", "straight-through"),
    "router.causal": ("treshold", "threshold"),
    "router.input": ("previus", "previous"),
    "balance.scope": ("seq", "sequence"),
    "balance.bias_step": ("signs", "sign"),
    "balance.priority": ("scores", "score"),
    "balance.overflow": ("nxt", "next"),
    "balance.force": ("balance", "balanced"),
    "tokenizer.name": ("gpt-2", "gpt2"),
    "data.name": ("blends", "blend"),
    "data.clean.unicode": ("NFKD", "NFKC"),
    "data.documents": ("seperate", "separate"),
    "optim.name": ("adam", "adamw"),
    "optim.adjust": ("origin", "original"),
    "optim.schedule": ("cosin", "cosine"),
    "train.precision": ("fp16", "bf16"),
    "train.non_finite": ("skipp", "skip"),
    "parallel.weights": ("bf_16", "bf16"),
    "parallel.gradients": ("fp23", "fp32"),
}
LIMITS = accepted(Config)
BOUNDS = {path: (limit.low, limit.high) for path, limit in LIMITS.items() if isinstance(limit, Between)}
CHOICES = {path: limit for path, limit in LIMITS.items() if isinstance(limit, OneOf)}
OUT_OF_RANGE = [
    (path, value)
    for path, (low, high) in BOUNDS.items()
    for value in {low - 1 if float(low).is_integer() else low / 2, high + 1 if high < 2**31 - 1 else low - 1}
]
NOT_FINITE = [
    (path, value)
    for path in (
        "router.scale",
        "balance.aux",
        "balance.z",
        "optim.lr",
        "optim.clip",
        "data.max_mb",
        "model.rope_theta",
    )
    for value in (math.inf, -math.inf, math.nan)
]


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(key):
    assert refusal({key: 1}) == f"{key} is not a setting; did you mean {MISSPELT[key]}."


def test_a_key_like_no_other_is_refused_with_all_that_are_accepted():
    assert refusal({"checkpoint.zzz": 1}) == "checkpoint.zzz is not a setting; accepted here: aside, every, keep."


@pytest.mark.parametrize("path", WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(path):
    value = WRONG_TYPES[path]
    message = refusal({path.split("[")[0]: value})
    shown = value["[1]" in path] if "[" in path else value
    assert message.startswith(f"{path}={shown!r} must be ")


@pytest.mark.parametrize("path", NOT_A_CHOICE)
def test_a_value_that_is_no_choice_is_refused_with_the_nearest(path):
    value, nearest = NOT_A_CHOICE[path]
    own = path == "router.name"
    words = ", ".join(ROUTERS) + ", or module:Class for your own" if own else ", ".join(CHOICES[path])
    assert refusal({path: value}) == f"{path}={value} is not one of {words}; did you mean {nearest}."


@pytest.mark.parametrize(("path", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_with_the_range(path, value):
    is_float = fields(Config)[path] is float
    message = refusal({path: float(value) if is_float else int(value)})
    low, high = BOUNDS[path]
    assert message.startswith(f"{path}=")
    assert f"{low:g}" in message
    assert high >= 2**31 - 1 or f"{high:g}" in message


@pytest.mark.parametrize(("path", "value"), NOT_FINITE)
def test_infinity_and_nan_are_no_numbers_here(path, value):
    assert refusal({path: value}).startswith(f"{path}={value} is out of range: accepted is a finite number")


def test_a_configuration_that_is_no_group_is_refused():
    with pytest.raises(BadInput, match="the configuration=3 must be a group of settings"):
        build(3)


def test_every_number_has_bounds_and_every_bound_and_choice_a_setting():
    types = fields(Config)
    assert {path for path, hint in types.items() if hint in (int, float)} == set(BOUNDS)
    assert {*CHOICES, "router.name"} == set(NOT_A_CHOICE) <= set(types)


@pytest.mark.parametrize("path", list(BOUNDS))
def test_bounds_contain_the_default(path):
    low, high = BOUNDS[path]
    assert low <= parse.lookup(build(tree({"model.latent": {}})), path) <= high


ROUND_TRIP = {
    "defaults": {},
    "moe": {"model": {"moe": {"n_experts": 3, "k": 3}}},
    "lists and floats": {"optim": {"betas": (0, 0.5), "lr": 1}, "data": {"domains": ["drama"]}},
    "sigmoid": {"router": {"name": "sigmoid", "selection_bias": True}, "balance": {"bias_rate": 0.001}},
}


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_build_takes_back_what_to_dict_gives(name):
    cfg = build(ROUND_TRIP[name])
    assert build(to_dict(cfg)) == cfg


def test_integers_become_floats_where_a_float_is_meant():
    assert isinstance(build({"optim": {"lr": 1, "betas": [0, 0]}}).optim.lr, float)


def test_lookup_passes_over_a_group_that_is_absent():
    assert parse.lookup(build({}), "model.moe.k") is None
    assert parse.lookup(build(tree({})), "model.moe.k") == 4
