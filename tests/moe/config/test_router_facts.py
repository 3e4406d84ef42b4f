"""The table of router facts: every entry is held against the router itself, and nobody goes by a name instead."""

import ast
from pathlib import Path

import pytest
import torch

from moe.config.balance import BalanceConfig, validate
from moe.config.model import MoEConfig
from moe.config.router import (
    ALWAYS,
    FACTS,
    OWN,
    ROUTERS,
    RouterConfig,
    facts,
    n_choices,
    rows_per_token,
    soft_slots,
    weight_sum,
)
from moe.routing.build import build_router
from moe.routing.contract import Context, Mixture
from tests.conftest import PRESETS

ROOT = Path(__file__).parents[3]
EXACT = dict(rtol=1e-12, atol=1e-12)
N_SEQUENCES, CONTEXT, D, V = 2, 16, 12, 17
# Who may go by the name: the table itself, and what makes a router of a name.
MAY_COMPARE = ("moe/config/router.py", "moe/routing/build.py")


def _layer(make_layer, preset):
    moe = {"n_experts": 8, "k": 3} | preset.moe
    moe |= {"k": 8} if moe["k"] == "all" else {}
    return make_layer(preset.router, balance=preset.balance, **moe), MoEConfig(**moe)


def _x():
    generator = torch.Generator().manual_seed(3)
    return torch.randn((N_SEQUENCES, CONTEXT, D), generator=generator, dtype=torch.float64)


def _ids():
    return torch.randint(0, V, (N_SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(5))


def _decide(router):
    torch.manual_seed(7)
    with torch.no_grad():
        return router(_x().flatten(0, 1), "reference", Context(_ids().flatten(), N_SEQUENCES))


@pytest.mark.parametrize("name", PRESETS)
def test_who_is_said_to_have_scores_has_them_and_they_are_of_that_kind(name, make_layer):
    preset = PRESETS[name]
    about, decision = facts(preset.router), _decide(_layer(make_layer, preset)[0].router)
    assert about.scored == (not isinstance(decision, Mixture) and decision.logits_TE is not None)
    assert not about.scored or decision.score == about.score


@pytest.mark.parametrize("name", PRESETS)
def test_every_router_names_as_many_experts_as_is_said_of_it(name, make_layer):
    preset = PRESETS[name]
    layer, moe = _layer(make_layer, preset)
    said, decision = n_choices(preset.router, moe), _decide(layer.train().router)
    if said is None:
        assert not facts(preset.router).rectangular
        assert isinstance(decision, Mixture) or decision.token_N is not None
    else:
        assert facts(preset.router).rectangular
        assert decision.expert.shape == (N_SEQUENCES * CONTEXT, said)


@pytest.mark.parametrize(("k_max", "said"), [(0, 8), (3, 3), (99, 8)])
@pytest.mark.parametrize("name", [name for name in ROUTERS if "k_max" in FACTS[name].reads])
def test_a_most_is_what_is_named_up_to_all_experts(name, k_max, said, make_layer):
    router, moe = RouterConfig(name, k_max=k_max), MoEConfig(n_experts=8, k=2)
    assert n_choices(router, moe) == said
    assert _decide(make_layer(router, n_experts=8, k=2).router).expert.shape[1] == said


@pytest.mark.parametrize("name", PRESETS)
def test_a_tokens_weights_sum_to_what_is_said_and_where_nothing_is_said_they_differ(name, make_layer):
    preset = PRESETS[name]
    said, decision = weight_sum(preset.router), _decide(_layer(make_layer, preset)[0].eval().router)
    if isinstance(decision, Mixture):
        total_T = decision.combine_BSEP.sum((-2, -1)).flatten()
    else:
        token_N, expert_N, weight_N = decision.rows()
        weight_N = torch.where(expert_N >= 0, weight_N, 0.0)
        total_T = torch.zeros(N_SEQUENCES * CONTEXT, dtype=torch.float64).index_add(0, token_N, weight_N)
    if name == "dense":  # all experts, of probabilities
        said = 1.0
    if said is None:
        assert total_T.std() > 1e-3
    else:
        torch.testing.assert_close(total_T, torch.full_like(total_T, said), **EXACT)


@pytest.mark.parametrize("name", [name for name in ROUTERS if "scale" in FACTS[name].reads])
def test_the_sum_that_is_said_has_the_scale_in_it(name, make_layer):
    router = RouterConfig(name, scale=2.5)
    said, decision = weight_sum(router), _decide(make_layer(router, n_experts=8, k=3).eval().router)
    if said is not None:
        torch.testing.assert_close(decision.weight.sum(-1), torch.full((32,), 2.5, dtype=torch.float64), **EXACT)
        assert said == 2.5


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_class_says_of_itself_agrees(name, make_layer):
    preset = PRESETS[name]
    about, router = facts(preset.router), _layer(make_layer, preset)[0].router
    assert router.causal == (about.decides == "token")
    assert router.fixed_k == (about.choices == "k")
    alone = about.decides != "sequence" and ("causal" not in about.reads or preset.router.causal != "none")
    assert router.per_token == router.causal_in_eval == alone


@pytest.mark.parametrize("name", PRESETS)
def test_experts_compute_as_many_rows_as_is_said(name, make_layer):
    """Of who takes exactly K on average; the others are counted as if they did."""
    preset = PRESETS[name]
    layer, moe = _layer(make_layer, preset)
    said, decision = rows_per_token(preset.router, moe, CONTEXT), _decide(layer.eval().router)
    if isinstance(decision, Mixture):
        n_sequences, _, n_experts, n_slots = decision.dispatch_BSEP.shape
        assert n_slots == soft_slots(preset.router, moe, CONTEXT)
        assert said * N_SEQUENCES * CONTEXT == n_sequences * n_experts * n_slots
        return
    assert said == moe.k
    if facts(preset.router).choices in ("k", "ragged") and preset.router.causal == "none":
        assert (decision.expert >= 0).sum() == said * N_SEQUENCES * CONTEXT


class _Watched:
    """Settings that remember which of them were looked at."""

    def __init__(self, cfg):
        self._cfg, self.seen = cfg, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self._cfg, name)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_setting_that_a_router_is_said_to_read_it_reads(name):
    cfg = _Watched(RouterConfig(name, causal="threshold" if "causal" in FACTS[name].reads else "none"))
    moe = MoEConfig(n_experts=4, k=1 if name == "base" else 2)
    router = build_router(cfg, D, moe, vocab_size=V, context=CONTEXT).double()
    for p in router.parameters():
        torch.nn.init.normal_(p)
    decision = _decide(router.train())
    observed = {} if isinstance(decision, Mixture) else decision.observed or {}
    router.update(BalanceConfig(), 0.0, torch.ones(4, dtype=torch.int64), observed)
    assert set(FACTS[name].reads) <= cfg.seen


def test_what_is_read_is_a_setting_and_none_that_all_read():
    for about in FACTS.values():
        assert set(about.reads) <= set(RouterConfig.__dataclass_fields__) - set(ALWAYS)


def test_of_a_router_of_ones_own_nothing_is_known_and_nothing_refused():
    router, moe = RouterConfig("some.module:Class", scale=2.0), MoEConfig(n_experts=8, k=3)
    assert facts(router) is OWN
    assert n_choices(router, moe) is weight_sum(router) is None
    assert rows_per_token(router, moe, CONTEXT) == 3
    validate([moe], router, BalanceConfig(capacity=1.0, overflow="next"))
    validate([moe], router, BalanceConfig(tile=4))


def _is_a_routers_name(node, file):
    """Whether an expression is `router.name`, `cfg.router.name`, or in a router itself `cfg.name`."""
    words = ast.unparse(node).split(".")
    own = ("cfg",) if file.startswith("moe/routing/") else ()
    return len(words) > 1 and words[-1] == "name" and words[-2] in ("router", *own)


def test_no_other_file_goes_by_a_routers_name():
    found = []
    for path in sorted([*(ROOT / "moe").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            sides = [node.subject] if isinstance(node, ast.Match) else []
            sides += [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if file not in MAY_COMPARE and any(_is_a_routers_name(side, file) for side in sides):
                found.append(f"{file}:{node.lineno}")
    assert found == [], "a fact of `moe.config.router.FACTS` should be asked instead"
