"""The router: what it cannot be asked, and with which experts."""

import pytest

from tests.moe.config.refusals import refusal

SCORELESS = {"balance.aux": 0.0, "balance.z": 0.0}
IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "tokens pass by mixed sequences": (
        {"model.moe.depth": 0.5, "router.name": "soft", "balance.aux": 0.0, "balance.z": 0.0},
        "model.moe.depth=0.5 lets tokens pass a block by and does not go with router.name=soft",
    ),
    "tokens pass by the previous layer": (
        {"model.moe.depth": 0.5, "router.input": "previous"},
        "does not go with router.input=previous",
    ),
    "K > E": ({"model.moe.k": 9, "model.moe.n_experts": 8}, "model.moe.k=9 exceeds model.moe.n_experts=8"),
    "more groups kept than there are": ({"router.k_groups": 2}, "router.k_groups=2 exceeds router.groups=1"),
    "groups that do not divide": (
        {"router.groups": 3, "model.moe.n_experts": 8},
        "router.groups=3 must divide model.moe.n_experts=8",
    ),
    "a null expert for a soft router": (
        {"router.name": "soft", "model.moe.n_null": 1, **SCORELESS},
        "router.name=soft mixes",
    ),
    "a setting that another router reads": (
        {"router.name": "base", "router.threshold": 2.0, "model.moe.k": 1},
        "router.threshold=2.0 means nothing to router.name=base, which reads no setting of its own",
    ),
    "options for a router of the library": ({"router.options": {"a": 1}}, "is read by a router of your own only"),
    "a least sum that divides nothing": (
        {"router.norm_min": 0.1, "router.renormalize": False},
        "router.norm_min=0.1 means nothing to router.renormalize=false",
    ),
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
    "a random second of three": (
        {"router.second": "random", "model.moe.k": 3},
        "router.second=random needs model.moe.k=2",
    ),
    "sparsemixer renormalised": (
        {"router.gradient": "sparsemixer"},
        "router.gradient=sparsemixer needs router.name=softmax",
    ),
    "default vectors renormalised": ({"router.gradient": "default-vector"}, "set router.renormalize=false"),
    "widths for other experts": (
        {"model.moe.widths": [8, 8]},
        "model.moe.widths has 2 widths for model.moe.n_experts=16",
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
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)
