"""The table of families: that it speaks of settings and keys there are."""

import dataclasses

import pytest
import transformers

from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_families import FAMILIES, USUAL

FIELDS = {
    "model": {field.name for field in dataclasses.fields(ModelConfig)},
    "model.moe": {field.name for field in dataclasses.fields(MoEConfig)},
    "router": {field.name for field in dataclasses.fields(RouterConfig)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_named_by_its_model_type_and_speaks_of_settings_that_there_are(name: str) -> None:
    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(name)
    assert transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__ == family.architecture
    assert family.model.keys() | family.keys.keys() <= FIELDS["model"]
    assert not family.model.keys() & family.keys.keys()
    assert family.moe.keys() <= FIELDS["model.moe"]
    assert family.router.keys() <= FIELDS["router"]
    for path in USUAL | family.fixed:
        group, _, field = path.rpartition(".")
        assert field in FIELDS[group], path
    keys = {*family.keys.values(), *family.moe.values(), *family.router.values()}
    assert {key for key in keys if not hasattr(config, key)} <= {"head_dim", "partial_rotary_factor"}  # beside its own


def test_what_is_usual_is_the_default_of_every_setting() -> None:
    groups = {"model.moe": MoEConfig(), "router": RouterConfig()}
    for path, value in USUAL.items():
        group, _, field = path.rpartition(".")
        assert getattr(groups[group], field) == value, path
