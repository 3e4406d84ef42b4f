"""Settings by dotted paths, and the sentence that refuses them: for the tests of moe/config/."""

import dataclasses
import typing

import pytest

from moe.config.run import build
from moe.errors import BadInput


def tree(settings):
    """A nested dict from dotted paths, around an MoE model."""
    nested: dict = {"model": {"moe": {}}}
    for path, value in settings.items():
        node, (*groups, key) = nested, path.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return nested


def refusal(settings):
    """The one sentence that `build` refuses them with."""
    with pytest.raises(BadInput) as caught:
        build(tree(settings))
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def fields(cls, prefix=""):
    """Dotted path -> type of every setting below a dataclass."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        hint = next((arm for arm in typing.get_args(hint) if dataclasses.is_dataclass(arm)), hint)
        found |= fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found
