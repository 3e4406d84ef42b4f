"""Settings: what is refused, with which words, and what identifies a run."""

import dataclasses
import math
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe.config import parse
from moe.config.parse import Between, OneOf, accepted, to_dict
from moe.config.router import ROUTERS
from moe.config.run import Config, build, fingerprint
from moe.errors import BadInput
from moe.model import transformer

ROOT = Path(__file__).parents[3]

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
    "dispatch": ("tritonn", "triton"),
    "model.activation": ("swigl", "swiglu"),
    "model.norm": ("rmss", "rms"),
    "model.position": ("ropee", "rope"),
    "model.qk_norm": ("heads", "head"),
    "model.moe.depth_causal": ("predict", "predictor"),
    "router.name": ("soft-max", "softmax"),
    "router.logits": ("cos", "cosine"),
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
    "optim.schedule": ("cosin", "cosine"),
    "train.precision": ("fp16", "bf16"),
    "train.non_finite": ("skipp", "skip"),
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
SCORELESS = {"balance.aux": 0.0, "balance.z": 0.0}
IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "tokens pass by no layer": (
        {"model.moe.depth": 0.5, "model.moe.depth_every": 5},
        "model.moe.depth=0.5 with model.moe.depth_every=5 concerns none of the MoE layers [0, 1, 2, 3]",
    ),
    "tokens pass by mixed sequences": (
        {"model.moe.depth": 0.5, "router.name": "soft", "balance.aux": 0.0, "balance.z": 0.0},
        "model.moe.depth=0.5 lets tokens pass a block by and does not go with router.name=soft",
    ),
    "tokens pass by the previous layer": (
        {"model.moe.depth": 0.5, "router.input": "previous"},
        "does not go with router.input=previous",
    ),
    "no room for the tokens that enter": (
        {"model.moe.depth": 0.01, "balance.capacity": 0.01, "train.batch_size": 1, "model.moe.depth_every": 1},
        "leaves no expert room for one token: with 3 tokens",
    ),
    "K > E": ({"model.moe.k": 9, "model.moe.n_experts": 8}, "model.moe.k=9 exceeds model.moe.n_experts=8"),
    "D % H": ({"model.d_model": 100, "model.n_heads": 3}, "model.d_model=100 is not divisible by model.n_heads=3"),
    "kv heads": ({"model.n_kv_heads": 3}, "model.n_kv_heads=3 must divide model.n_heads=4"),
    "more kv heads": ({"model.n_kv_heads": 8}, "model.n_kv_heads=8 must divide model.n_heads=4"),
    "odd rotary": ({"model.head_dim": 7}, "model.position=rope needs an even head dimension, and here it is 7"),
    "no layer (every)": ({"model.moe.every": 5}, "model.moe.every=5 with model.moe.first_dense=0 leaves no MoE layer"),
    "no layer (first_dense)": ({"model.moe.first_dense": 4}, "model.moe.first_dense=4 leaves no MoE layer"),
    "more groups kept than there are": ({"router.k_groups": 2}, "router.k_groups=2 exceeds router.groups=1"),
    "groups that do not divide": (
        {"router.groups": 3, "model.moe.n_experts": 8},
        "router.groups=3 must divide model.moe.n_experts=8",
    ),
    "a null expert for a soft router": (
        {"router.name": "soft", "model.moe.n_null": 1, **SCORELESS},
        "router.name=soft mixes",
    ),
    "a balance term without scores": (
        {"router.name": "hash"},
        "balance.aux=0.01 reads scores, and router.name=hash gives none: set balance.aux=0",
    ),
    "a setting that another router reads": (
        {"router.name": "base", "router.threshold": 2.0, "model.moe.k": 1},
        "router.threshold=2.0 means nothing to router.name=base, which reads no setting of its own",
    ),
    "options for a router of the library": ({"router.options": {"a": 1}}, "is read by a router of your own only"),
    "BASE with two experts": ({"router.name": "base", "model.moe.k": 2}, "set model.moe.k=1 (it is 2)"),
    "sinkhorn that learns nothing": (
        {"router.name": "sinkhorn", "model.moe.k": 1},
        "router.renormalize=true with model.moe.k=1 makes every weight 1",
    ),
    "top-1 that learns nothing": (
        {"model.moe.k_by_layer": [2, 1, 2, 2]},
        "router.renormalize=true with model.moe.k=1 makes every weight 1, and router.name=softmax would learn nothing",
    ),
    "at most one that learns nothing": (
        {"router.name": "top-p", "router.k_max": 1, "router.scale": 2.5},
        "router.renormalize=true with router.k_max=1 makes every weight 2.5",
    ),
    "a random second by no weight": (
        {"router.second": "random", "model.moe.k": 2, "router.gradient": "straight-through"},
        "router.second=random goes by the weights, which router.gradient=straight-through changes",
    ),
    "a tile that leaves nothing": (
        {"balance.tile": 2048, "model.moe.k": 2, "train.batch_size": 8, "model.context": 128},
        "balance.tile=2048 is more than twice the 128 rows of an expert in a micro-batch",
    ),
    "a random second of three": (
        {"router.second": "random", "model.moe.k": 3},
        "router.second=random needs model.moe.k=2",
    ),
    "sparsemixer renormalised": (
        {"router.gradient": "sparsemixer"},
        "router.gradient=sparsemixer needs router.name=softmax",
    ),
    "default vectors renormalised": ({"router.gradient": "default-vector"}, "set router.renormalize=false"),
    "a load loss without noise": ({"balance.load": 0.1}, "balance.load=0.1 needs router.noisy=true"),
    "capacity where experts choose": (
        {"router.name": "expert-choice", "balance.capacity": 1.0},
        "balance.capacity=1.0 has no meaning for router.name=expert-choice",
    ),
    "capacity and token rounding": ({"balance.capacity": 1.0, "balance.tile": 8}, "choose one of them"),
    "capacity below one token": (
        {"balance.capacity": 1e-6},
        "balance.capacity=1e-06 leaves no expert room for one token",
    ),
    "a next expert without capacity": ({"balance.overflow": "next"}, "balance.overflow=next needs balance.capacity"),
    "a schedule of nothing": ({"balance.schedule": {"auxx": [1.0]}}, "balance.schedule.auxx is not a coefficient"),
    "an empty schedule": ({"balance.schedule": {"aux": []}}, "must be a list of factors of at least 0"),
    "widths for other experts": (
        {"model.moe.widths": [8, 8]},
        "model.moe.widths has 2 widths for model.moe.n_experts=16",
    ),
    "a layer short": (
        {"model.moe.k_by_layer": [1]},
        "model.moe.k_by_layer=[1] needs 4 numbers, one for each MoE layer",
    ),
    "a gate with nothing behind it": ({"model.moe.shared_gate": True}, "has no shared expert to gate"),
    "a shared router for different layers": (
        {"router.shared": True, "model.moe.k_by_layer": [3, 3, 2, 2]},
        "router.shared=true needs the same n_experts and k in every MoE layer",
    ),
    "K > the experts of the groups": (
        {"router.groups": 4, "router.k_groups": 1, "model.moe.n_experts": 8, "model.moe.k": 3},
        "model.moe.k=3 exceeds the 2 experts in router.k_groups=1 groups of 2",
    ),
    "a group's best of more than it has": (
        {"router.groups": 4, "router.k_groups": 4, "router.group_top": 3, "model.moe.n_experts": 8},
        "router.group_top=3 exceeds the 2 experts of a group",
    ),
    "bias without bias": ({"balance.bias_rate": 0.001}, "balance.bias_rate=0.001 needs a selection bias"),
    "domain": (
        {"data.domains": ["drama", "poetry"]},
        "data.domains has 'poetry'; the blend's domains are drama, verse",
    ),
    "no path": ({"data.name": "text"}, "data.name=text needs data.path"),
    "no dataset": ({"data.name": "huggingface"}, "data.name=huggingface needs data.path"),
    "lengths": ({"data.clean.max_chars": 50}, "data.clean.max_chars=50 is below data.clean.min_chars=100"),
    "one beta": ({"optim.betas": [0.9]}, "optim.betas=[0.9] must be two numbers in [0, 1)"),
    "beta 1": ({"optim.betas": [0.9, 1.0]}, "optim.betas=[0.9, 1.0] must be two numbers"),
    "beta nan": ({"optim.betas": [math.nan, 0.9]}, "optim.betas=[nan, 0.9] must be two numbers"),
    "warm-up": ({"optim.warmup": 601}, "optim.warmup=601 is longer than train.steps=600"),
    "accumulate": ({"train.accumulate": 3}, "train.accumulate=3 must divide train.batch_size=8"),
    "device": ({"train.device": "gpu"}, "train.device=gpu is not one of auto, cpu, cuda, cuda:N"),
    "device number": ({"train.device": "0"}, "train.device=0 is not one of auto, cpu, cuda, cuda:N"),
    "device without number": ({"train.device": "cuda:"}, "train.device=cuda: is not one of auto"),
}


def _tree(settings):
    """A nested dict from dotted paths, around an MoE model."""
    tree = {"model": {"moe": {}}}
    for path, value in settings.items():
        node, (*groups, key) = tree, path.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return tree


def _refusal(settings):
    with pytest.raises(BadInput) as caught:
        build(_tree(settings))
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def _no_model_is_built(monkeypatch):
    def refuse(*args):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformer.Transformer, "__init__", refuse)


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(key):
    assert _refusal({key: 1}) == f"{key} is not a setting; did you mean {MISSPELT[key]}."


def test_a_key_like_no_other_is_refused_with_all_that_are_accepted():
    assert _refusal({"checkpoint.zzz": 1}) == "checkpoint.zzz is not a setting; accepted here: every, keep."


@pytest.mark.parametrize("path", WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(path):
    value = WRONG_TYPES[path]
    message = _refusal({path.split("[")[0]: value})
    shown = value["[1]" in path] if "[" in path else value
    assert message.startswith(f"{path}={shown!r} must be ")


@pytest.mark.parametrize("path", NOT_A_CHOICE)
def test_a_value_that_is_no_choice_is_refused_with_the_nearest(path):
    value, nearest = NOT_A_CHOICE[path]
    own = path == "router.name"
    words = ", ".join(ROUTERS) + ", or module:Class for your own" if own else ", ".join(CHOICES[path])
    assert _refusal({path: value}) == f"{path}={value} is not one of {words}; did you mean {nearest}."


@pytest.mark.parametrize(("path", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_with_the_range(path, value):
    is_float = _fields(Config)[path] is float
    message = _refusal({path: float(value) if is_float else int(value)})
    low, high = BOUNDS[path]
    assert message.startswith(f"{path}=")
    assert f"{low:g}" in message
    assert high >= 2**31 - 1 or f"{high:g}" in message


@pytest.mark.parametrize(("path", "value"), NOT_FINITE)
def test_infinity_and_nan_are_no_numbers_here(path, value):
    assert _refusal({path: value}).startswith(f"{path}={value} is out of range: accepted is a finite number")


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in _refusal(settings)


def test_a_configuration_that_is_no_group_is_refused():
    with pytest.raises(BadInput, match="the configuration=3 must be a group of settings"):
        build(3)


def _fields(cls, prefix=""):
    """Dotted path -> type of every setting below a dataclass."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        hint = next((arm for arm in typing.get_args(hint) if dataclasses.is_dataclass(arm)), hint)
        found |= _fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def test_every_number_has_bounds_and_every_bound_and_choice_a_setting():
    fields = _fields(Config)
    assert {path for path, hint in fields.items() if hint in (int, float)} == set(BOUNDS)
    assert {*CHOICES, "router.name"} == set(NOT_A_CHOICE) <= set(fields)


@pytest.mark.parametrize("path", list(BOUNDS))
def test_bounds_contain_the_default(path):
    low, high = BOUNDS[path]
    assert low <= parse.lookup(build(_tree({})), path) <= high


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


def test_a_command_may_extend_the_settings():
    @dataclass
    class Bench(Config):
        repeats: int = 3

    assert build({"repeats": 5, "seed": 2}, Bench) == Bench(seed=2, repeats=5)
    with pytest.raises(BadInput, match="repeat is not a setting; did you mean repeats"):
        build({"repeat": 5}, Bench)


NOT_IN_FINGERPRINT = {"run", "resume", "data.cache", "data.workers"}


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


@pytest.mark.parametrize("path", _fields(Config))
def test_the_fingerprint_sees_what_decides_the_result_and_nothing_else(path):
    cfg = build(_tree({}))
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


def test_the_settings_import_neither_torch_nor_hydra():
    code = (
        "import sys, moe.config.run\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'hydra', 'omegaconf', 'numpy', 'yaml'}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        == "[]\n"
    )


def test_lookup_passes_over_a_group_that_is_absent():
    assert parse.lookup(build({}), "model.moe.k") is None
    assert parse.lookup(build(_tree({})), "model.moe.k") == 4


def test_defaults_are_not_shared_between_configurations():
    build({}).data.domains.append("drama")
    assert build({}).data.domains == []
