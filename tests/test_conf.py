"""Claims about conf/: every file composes into valid settings, and names nothing that does not exist."""

import dataclasses
import itertools
import typing
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from experiments.cli import CONF, typed
from moe.config.model import ModelConfig
from moe.config.parse import accepted, parse, to_dict
from moe.config.router import ROUTERS
from moe.config.run import Config, build
from moe.errors import BadInput

GROUPS = ("model", "router", "balance", "tokenizer", "data", "optim", "parallel")
LIMITS = accepted(Config)
CHOICE_FILES = [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
# What a choice cannot do without.
NEEDS = {
    "balance/bias": ["router=sigmoid-bias"],
    "balance/cv": ["router=noisy"],
    "data/text": ["data.path=texts"],
    "data/chat": ["data.path=chats.jsonl"],
    "experiment/sft": ["data.path=chats.jsonl"],
    "data/huggingface": ["data.path=some/dataset"],
    "tokenizer/saved": ["tokenizer.path=runs/NAME"],
    "data/preferences": ["data.path=pairs.jsonl"],
    "data/prompts": ["data.path=prompts.jsonl"],
    "experiment/sums": ["data.path=texts.jsonl"],
    "experiment/dpo": ["source=runs/NAME", "data.path=pairs.jsonl"],
    "experiment/reward": ["source=runs/NAME", "data.path=pairs.jsonl"],
    "experiment/grpo": ["source=runs/NAME", "data.path=prompts.jsonl"],
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def compose():
    """(overrides) -> the validated settings of `experiments.train`."""
    ConfigStore.instance().store(name="schema_train", node=Config)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        yield lambda *overrides: typed(hydra.compose("train", overrides=list(overrides)), Config)


def test_the_folders_are_the_dataclass_fields_that_are_groups():
    """One name for a thing: folder, field, and what is typed on a command line. A machine is none of a training run's:
    tests/experiments/test_simulate.py reads every one."""
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"experiment", "machine"}
    hints = typing.get_type_hints(Config)
    assert folders == set(GROUPS)
    assert all(dataclasses.is_dataclass(hints[name]) for name in folders)


def settings_of(path: Path) -> dict[str, Any]:
    """What a file sets of its own group. A router's file may set things of other groups too, by their full name."""
    tree = yaml.safe_load(path.read_text())
    return tree[path.parent.name] if "@package _global_" in path.read_text() else tree


@pytest.mark.parametrize("path", CHOICE_FILES, ids=name_of)
def test_a_choice_holds_only_valid_settings_of_its_group(path):
    tree = settings_of(path)
    hint = typing.get_type_hints(Config)[path.parent.name]
    parsed = to_dict(parse(hint, tree, f"{path.parent.name}."))
    for key, value in tree.items():
        assert parsed[key] == value or isinstance(value, dict)


@pytest.mark.parametrize("path", CHOICE_FILES, ids=name_of)
def test_a_choice_composes_and_takes_effect(path, compose):
    cfg = compose(f"{path.parent.name}={path.stem}", *NEEDS.get(name_of(path), []))
    group = to_dict(cfg)[path.parent.name]
    for key, value in settings_of(path).items():
        if isinstance(value, dict):
            assert value.items() <= group[key].items()
        else:
            assert group[key] == value


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=name_of)
def test_a_model_is_named_as_its_file_and_leaves_nothing_to_an_earlier_choice(path, compose):
    """Else a model chosen over the default one would keep some of it."""
    cfg = compose(f"model={path.stem}")
    assert cfg.model.name == path.stem
    assert cfg.model == parse(ModelConfig, yaml.safe_load(path.read_text()))


def test_every_experiment_composes_and_changes_something(compose):
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        if "study:" not in path.read_text():  # those are composed in tests/experiments/study/test_compose.py
            assert compose(f"experiment={path.stem}", *NEEDS.get(name_of(path), [])) != compose(), path


def test_every_choice_of_a_name_has_a_file():
    for key in ("router.name", "tokenizer.name", "data.name", "optim.schedule"):
        group = key.split(".")[0]
        named = {settings_of(path).get(key.split(".")[1]) for path in (CONF / group).glob("*.yaml")}
        assert set(ROUTERS if group == "router" else LIMITS[key]) - named <= {"constant"}, key


def test_routers_and_balances_combine(compose):
    for router, balance in itertools.product(("softmax", "sigmoid-bias"), ("none", "aux")):
        assert compose(f"router={router}", f"balance={balance}").router.name == router.split("-")[0]


def test_a_router_brings_its_balance_and_a_balance_that_is_asked_for_goes_first(compose):
    assert compose("router=hash").balance.aux == 0
    assert compose("router=switch").balance.capacity == 1.25
    assert compose("router=switch", "balance=none").balance.capacity == 0
    assert compose("router=switch").model.moe.k == 1
    assert compose("router=dense", "model=cpu-nano").model.moe.k == 8
    with pytest.raises(BadInput, match=r"balance\.aux=0\.01 reads scores, and router\.name=hash gives none"):
        compose("router=hash", "balance=aux")


def test_the_defaults_are_those_of_the_dataclasses(compose):
    """The YAML repeats a default, it has no other: the library and the command line train the same model."""
    assert compose() == build({"model": {"qk_norm": "head", "moe": {}}})
