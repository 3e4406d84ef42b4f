"""Every file of conf/router as the tests use it: its settings, its balance, and what it sets of the experts."""

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
