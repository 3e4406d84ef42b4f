"""Claims about which models run.c has: of every router of conf/router and of every family of transformers it says the
same greedy tokens, or the export names the setting that is in the way."""

import dataclasses
import re

import pytest
import transformers

from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.convert import export_c
from moe.convert.hf_config import config_from_hf
from moe.errors import BadInput
from moe.eval.generate import generate
from tests.c_program import NEEDS_COMPILER, ids_of, random_model, sizes
from tests.moe.convert.test_hf_weights import VARIANTS
from tests.router_presets import presets_of_routers

pytestmark = NEEDS_COMPILER

PROMPT, NEW = list(b"To be, or not"), 256
ROUTERS = presets_of_routers()
REFUSED_ROUTERS = {
    "base": "router.name=base",
    "cosine": "router.logits=cosine",
    "default-vector": "router.gradient=default-vector",
    "expert-choice": "router.name=expert-choice",
    "expert-choice-predictor": "router.name=expert-choice",
    "expert-choice-threshold": "router.name=expert-choice",
    "hash": "router.name=hash",
    "layer-shared": "router.shared=True",
    "lookahead": "router.input=previous",
    "mod": "model.moe.depth=0.125",
    "mode": "model.moe.n_null=4",
    "moepp": "model.moe.n_constant=2",
    "relu": "router.name=relu",
    "sinkhorn": "router.name=sinkhorn",
    "soft": "router.name=soft",
    "sparsemixer": "router.gradient=sparsemixer",
    "sqrt_softplus": "router.name=sqrt_softplus",
    "straight-through": "router.gradient=straight-through",
    "threshold": "router.name=threshold",
    "top-p": "router.name=top-p",
}
# Families that run.c has, without sliding windows; variants of others have their tokens or are refused by name.
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "dots1")


def refusal(cfg, router, balance=None):
    """What the export says of such a model, or None."""
    try:
        export_c.check(Config(model=cfg, router=router, balance=balance or BalanceConfig()))
    except BadInput as error:
        return str(error)
    return None


def check_tokens(cfg, router, say):
    """256 greedy tokens, through several contexts, of a model with random weights."""
    model = random_model(cfg, router)
    done = say(model, "-i", " ".join(map(str, PROMPT)), "-n", str(NEW), "-t", "0", "--ids")
    new = list(generate(model, PROMPT, NEW, temperature=0, eot=256))
    assert (ids_of(done), len(new), len(set(new)) > 10) == (new, NEW, True)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_of_conf_has_its_tokens_or_is_refused_by_name(name, say):
    router, balance, moe = ROUTERS[name]
    changes = moe | {"k": 8} if moe.get("k") == "all" else moe
    cfg = sizes(MoEConfig(**{"n_experts": 8, "k": 2, "d_expert": 32} | changes))
    said = refusal(cfg, router, balance)
    if name in REFUSED_ROUTERS:
        assert said
        assert said.startswith(f"{REFUSED_ROUTERS[name]} has no counterpart in run.c: accepted is ")
        return
    assert said is None
    check_tokens(cfg, router, say)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_has_its_tokens_or_is_refused_by_name(variant, say):
    model_type, settings = VARIANTS[variant]
    tree = transformers.AutoConfig.for_model(model_type, **settings | {"vocab_size": 257}).to_dict()
    cfg, router = config_from_hf(tree, variant)
    said = refusal(cfg, router)
    if cfg.window:
        assert said
        assert said.startswith("model.")  # of several settings the first is named
    elif model_type in FAMILIES:
        assert said is None
    if said:
        assert re.match(r"(model|router)\.[\w.]+=.* has no counterpart in run\.c: accepted is ", said)
        return
    check_tokens(dataclasses.replace(cfg, init_std=0.3), router, say)


@pytest.mark.parametrize("group", ["model", "model.moe", "router"])
def test_a_setting_that_nobody_has_thought_of_is_refused_by_its_name(group, monkeypatch):
    """As if each were new: left out of what run.c has, and not its default."""
    moe = MoEConfig(4, 2, 32, n_shared=1)
    cfg = Config(model=sizes(moe), router=RouterConfig(scale=2.0))
    name = {"model": "d_ff", "model.moe": "n_shared", "router": "scale"}[group]
    export_c.check(cfg)
    known = " ".join(word for word in export_c._HAS[group].split() if word != name)
    monkeypatch.setitem(export_c._HAS, group, known)
    with pytest.raises(BadInput, match=rf"^{group}\.{name}="):
        export_c.check(cfg)


def test_what_run_c_has_are_settings_that_there_are():
    for group, kind in (("model", ModelConfig), ("model.moe", MoEConfig), ("router", RouterConfig)):
        names = {field.name for field in dataclasses.fields(kind)}
        assert {*export_c._HAS[group].split()} <= names, group
