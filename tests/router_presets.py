"""Every file of conf/router as the tests use it: its settings, its balance, and what it sets of the experts."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe.config.balance import BalanceConfig
from moe.config.parse import parse
from moe.config.router import RouterConfig

CONF = Path(__file__).resolve().parent.parent / "conf"


class Preset(NamedTuple):
    """moe: changes to MoEConfig; k "all" means every expert."""

    router: RouterConfig
    balance: BalanceConfig
    moe: dict[str, Any]


def presets_of_routers() -> dict[str, Preset]:
    """By file name."""
    return {path.stem: _read(path) for path in sorted((CONF / "router").glob("*.yaml"))}


def different_layers(presets: dict[str, Preset]) -> dict[str, Preset]:
    """Without those whose layer, alone, is another's: it knows nothing of what layers share, of what they read of each
    other and of which tokens enter a block. The one that leaves these as they are stays."""
    kinds: dict[str, list[str]] = {}
    for name, (router, balance, moe) in presets.items():
        alone = dataclasses.replace(router, shared=False, input="own")
        settings = {key: moe[key] for key in sorted(moe.keys() - {"depth"})}
        plain = alone == router and "depth" not in moe
        names = kinds.setdefault(repr((alone, balance, settings)), [])
        names.insert(0 if plain else len(names), name)
    return {names[0]: presets[names[0]] for names in kinds.values()}


def _read(path: Path) -> Preset:
    tree = yaml.safe_load(path.read_text())
    if "router" not in tree:
        return Preset(parse(RouterConfig, tree), BalanceConfig(), {})
    chosen = [each["override /balance"] for each in tree.get("defaults", [])] or ["aux"]
    balance = parse(BalanceConfig, yaml.safe_load((CONF / "balance" / f"{chosen[0]}.yaml").read_text()))
    moe = tree.get("model", {}).get("moe", {})
    return Preset(
        parse(RouterConfig, tree["router"]),
        balance,
        moe | ({"k": "all"} if moe.get("k") == "${model.moe.n_experts}" else {}),
    )
