"""A search over what goes together: every preset of conf/router with policies, sizes and widths that no preset names.

`cases` draws combinations that `moe.config.balance.validate` accepts; each test holds one claim against some of them,
others for every preset. What a layer gives is held against loops over rows that use none of its code.
"""

import collections
import copy
import dataclasses
import itertools
import math
import zlib
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from kernels import reference
from moe.config.balance import BalanceConfig, validate
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.attention import KVCache
from moe.model.layer import LayerInput
from moe.routing.build import build_router
from moe.routing.contract import DROPPED, UNUSED, Context, Mixture, rows
from tests.conftest import PRESETS

EXACT = dict(rtol=1e-12, atol=1e-12)
# To bf16, each erring by 2^-9 at most: up, activation, down, weight, weighted row, sum.
ROUNDINGS = 6 * 2**-9
CHEAP = [{}, {"n_null": 1, "n_copy": 1, "n_constant": 2}, {"n_null": 2}, {"n_copy": 1}, {"n_constant": 1}]
SHARED = [{}, {"n_shared": 1}, {"n_shared": 2, "shared_gate": True}]
NO_POLICY = {"capacity": 0.0}
BALANCED = NO_POLICY | {"force": "balanced"}
BY_POSITION = [{"capacity": factor, "overflow": how} for factor in (1.0, 0.3, 1.25) for how in ("residual", "next")]
BY_SCORE = [each | {"priority": "score"} for each in BY_POSITION]
TILES = [NO_POLICY | {"tile": tile} for tile in (2, 3, 8)]
TERMS = [
    {},
    {"aux": 0.02, "scope": "sequence", "z": 0.0},
    {"importance": 0.1, "entropy": 0.1, "spread": 0.1, "bandpass": 0.1, "band": 0.01},
]


class Case(NamedTuple):
    """One combination, and how to run it: with the same weights, inputs and random numbers in every call."""

    router: RouterConfig
    balance: BalanceConfig
    moe: dict[str, Any]  # changes to MoEConfig
    training: bool
    shape: tuple[int, int]  # B, S
    backend: str
    seed: int

    def layer(self, make_layer, dtype=torch.float64):
        return make_layer(self.router, dtype, self.seed, balance=self.balance, **self.moe).train(self.training)

    def model(self, make_model):
        moe = MoEConfig(d_expert=7, **self.moe)
        return make_model(self.router, seed=self.seed, balance=self.balance, moe=moe).train(self.training)

    def x_BSD(self):
        return torch.randn((*self.shape, 12), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def tokens_BS(self):
        return torch.randint(0, 17, self.shape, generator=torch.Generator().manual_seed(self.seed))

    def run(self, layer, x_BSD, backend=None):
        torch.manual_seed(self.seed)
        return layer(x_BSD, backend or self.backend, LayerInput(self.tokens_BS().flatten()))

    def decision(self, layer, x_BSD):
        """What the router says in that pass, before anything limits it."""
        torch.manual_seed(self.seed)
        return layer.router(x_BSD.flatten(0, 1), "reference", Context(self.tokens_BS().flatten(), self.shape[0]))

    @property
    def policy(self):
        """Which of them is at work: none | balanced | capacity | tile."""
        if self.balance.force != "none":
            return self.balance.force
        return next((each for each in ("capacity", "tile") if self.training and getattr(self.balance, each)), "none")


def _goes(moe, router, balance):
    try:
        validate([MoEConfig(**moe)], router, balance)
    except BadInput:
        return False
    return True


def _sizes(preset):
    """Every E, cheap experts and K that the preset goes with, as changes to MoEConfig."""
    for n_experts, cheap in itertools.product((5, 1, 2, 3, 8), CHEAP):
        moe = preset.moe | cheap | {"n_experts": n_experts}
        most = n_experts + sum(moe.get(name, 0) for name in ("n_null", "n_copy", "n_constant"))
        for k in {"all": [most]}.get(moe.get("k"), [moe["k"]] if "k" in moe else sorted({1, 2, 3, 4, most})):
            if _goes(moe | {"k": k}, preset.router, BalanceConfig(aux=0.0, z=0.0)):
                yield moe | {"k": k}


def cases(preset, policies, terms=({},), training=(True, False), lengths=(7, 13, 2)):
    """Accepted combinations of one preset."""
    sizes = list(_sizes(preset))
    balances = [dataclasses.replace(preset.balance, **policy, **term) for policy in policies for term in terms]
    balances = [each for each in balances if _goes(sizes[0], preset.router, each)]

    def case(moe, mixed, shared, *drawn):
        widths = [3, 7, 1, 7, 2, 3, 7, 4][: moe["n_experts"]] if mixed else []
        return Case(preset.router, drawn[0], moe | shared | {"widths": widths}, *drawn[1:])

    options = [sizes, [False, True], SHARED, balances, training]
    options += [list(itertools.product((2, 1, 3), lengths)), ["torch", "reference"], range(2**16)]
    made = st.builds(case, *(st.sampled_from(each) for each in options))
    return made.filter(lambda case: _goes(case.moe, case.router, case.balance))


@pytest.fixture
def search(request, preset):
    """(claim, how many, *policies, **of which): call the claim with so many cases, others for every test and preset."""

    def run(claim, examples, *policies, **which):
        some = settings(max_examples=examples, phases=[Phase.generate])  # they are small: a failure is told at once
        seed(zlib.crc32(request.node.name.encode()))(some(given(cases(preset, policies, **which))(claim)))()

    return run


def _taken(routing):
    """{(token, expert): weight} of the rows that have an expert."""
    numbers = (each.tolist() for each in rows(routing.token_N, routing.expert, routing.weight))
    live = [(t, e, w) for t, e, w in zip(*numbers, strict=True) if e >= 0]
    taken = {(t, e): w for t, e, w in live}
    assert len(taken) == len(live), "a token takes an expert twice"
    return taken


# --- Accounting -------------------------------------------------------------------------------------------------------


def test_no_row_and_no_token_is_lost_and_no_limit_is_passed(search, make_layer):
    def claim(case):
        layer, x_BSD = case.layer(make_layer), case.x_BSD()
        report, asked = case.run(layer, x_BSD)[1], case.decision(layer, x_BSD)
        n_tokens, n_experts = math.prod(case.shape), layer.router.n_experts
        if isinstance(asked, Mixture):
            assert report.count_E.tolist() == [case.shape[0] * asked.dispatch_BSEP.shape[-1]] * n_experts
            assert report.dropped == report.skipped == 0
            return
        before, after = _taken(asked), _taken(report)
        wanted, count = (collections.Counter(e for _, e in each) for each in (before, after))
        assert report.wanted_E.tolist() == [wanted[e] for e in range(n_experts)]
        assert report.count_E.tolist() == [count[e] for e in range(n_experts)]
        assert len(after) + report.dropped + (report.expert == UNUSED).sum() == report.expert.numel()
        assert report.skipped == n_tokens - len({t for t, _ in after})
        added = len(after.keys() - before.keys()) if case.policy == "tile" else 0
        assert len(before) - len(after) == report.dropped - added
        if case.policy != "balanced":  # there all weights are made anew
            assert all(after[row] == before[row] for row in after.keys() & before.keys())
        if layer.router.fixed_k and not case.training:
            assert len(after) == n_tokens * case.moe["k"]
        if asked.logits_TE is not None:  # the loss is about what was wanted
            prob_E = (asked.prob_TE().sum(0) / max(1, n_tokens)).tolist()
            aux = n_experts * sum(wanted[e] / max(1, len(before)) * prob_E[e] for e in range(n_experts))
            assert report.aux.item() == pytest.approx(aux, abs=1e-12)
        _check_policy(case, before, after, n_experts, report.expert)

    policies = NO_POLICY, BALANCED, BALANCED, *BY_POSITION, *BY_SCORE, *TILES
    search(claim, 20, *policies, lengths=(7, 13, 1, 0, 2))


def _check_policy(case, before, after, n_experts, expert):
    every, n_tokens = range(n_experts), math.prod(case.shape)
    wanted, count = ([sum(e == taken for _, taken in each) for e in every] for each in (before, after))
    match case.policy:
        case "none":
            assert after == before
        case "balanced":
            assert max(count) - min(count) <= 1
        case "tile":
            tile = case.balance.tile
            nearest = [(each + tile // 2) // tile * tile for each in wanted]  # half a tile up, if there are tokens
            assert count == [n if n <= n_tokens else w // tile * tile for n, w in zip(nearest, wanted, strict=True)]
        case "capacity":
            share = Fraction(str(case.balance.capacity)) * n_tokens * case.moe["k"] / n_experts
            room = max(1, math.ceil(share))
            full = {e for e in every if count[e] == room}
            assert max(count) <= room
            assert {e for _, e in before.keys() - after.keys()} <= full, "a row lost an expert that had room"
            if case.balance.overflow == "residual":
                assert after.keys() <= before.keys()
                return
            for t in torch.nonzero((expert == DROPPED).any(-1)).flatten().tolist():
                assert full | {e for e in every if (t, e) in after} == {*every}, "dropped though there was room"


# --- What comes out ---------------------------------------------------------------------------------------------------


def _mlp(x_D, w_up, w_down):
    gate, up = (w_up @ x_D).chunk(2)
    return w_down @ (gate * gate.sigmoid() * up)


def _expert(layer, moe, e, x_D):
    """What expert e, cheap or not, makes of one token."""
    z, stack = e - moe.n_experts, layer.experts
    if z < 0:
        if moe.widths:
            stack = stack.stacks[sorted(set(moe.widths)).index(moe.widths[e])]
            e = moe.widths[:e].count(moe.widths[e])
        return _mlp(x_D, stack.w_up_EFD[e], stack.w_down_EDF[e])
    if z < moe.n_null + moe.n_copy:
        return 0 * x_D if z < moe.n_null else x_D
    z -= moe.n_null + moe.n_copy
    own, learned = (layer.cheap.mix.weight[2 * z : 2 * z + 2] @ x_D).softmax(0)
    return own * x_D + learned * layer.cheap.v_ZD[z]


def _by_hand(case, layer, x_BSD, report):
    """The layer's output from the rows that it reports (a soft router's from its mixture), row after row."""
    moe, asked, y_BSD = MoEConfig(**case.moe), case.decision(layer, x_BSD), torch.zeros_like(x_BSD)
    x_TD, y_TD = x_BSD.view(-1, 12), y_BSD.view(-1, 12)
    if isinstance(asked, Mixture):
        for b, e, p in itertools.product(*(range(n) for n in (case.shape[0], *asked.dispatch_BSEP.shape[2:]))):
            y_D = _expert(layer, moe, e, asked.dispatch_BSEP[b, :, e, p] @ x_BSD[b])
            y_BSD[b] += torch.outer(asked.combine_BSEP[b, :, e, p], y_D)
    else:
        for (t, e), weight in _taken(report).items():
            y_TD[t] += weight * _expert(layer, moe, e, x_TD[t])
    if layer.default_ED is not None:
        score_TE = reference.scores(asked.logits_TE, asked.score)
        for t, e in set(itertools.product(range(len(x_TD)), range(moe.n_experts))) - _taken(asked).keys():
            y_TD[t] += case.router.scale * score_TE[t, e] * layer.default_ED[e]
    for t in range(len(x_TD)) if moe.n_shared else ():
        gate = (layer.shared_gate.weight @ x_TD[t]).sigmoid() if moe.shared_gate else 1.0
        y_TD[t] += gate * _mlp(x_TD[t], layer.shared.up.weight, layer.shared.down.weight)
    return y_BSD


@torch.no_grad()
def test_the_output_is_the_sum_over_the_reported_rows_one_by_one(search, make_layer):
    def claim(case):
        layer, x_BSD = case.layer(make_layer), case.x_BSD()
        out, report = case.run(layer, x_BSD)
        torch.testing.assert_close(out, _by_hand(case, layer, x_BSD, report), **EXACT)

    search(claim, 12, NO_POLICY, BALANCED, *BY_POSITION, *TILES, lengths=(7, 13, 1, 0, 2))


def _everything(case, layer, backend):
    """Output, losses, rows, counts and named gradients of one pass, by name."""
    x_BSD = case.x_BSD().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out, report = case.run(layer, x_BSD, backend)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    ((out * direction).sum() + sum(report.losses.values())).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    reported = {name: value for name, value in report._asdict().items() if isinstance(value, torch.Tensor)}
    every = {"out": out, "gradient of x": x_BSD.grad} | gradients | report.losses | reported | report.observed
    return {name: value for name, value in every.items() if value is not None}


def _check_against_the_reference(case, make_layer, backend):
    layer = case.layer(make_layer)
    got, expected = _everything(case, layer, backend), _everything(case, layer, "reference")
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_torch_backend_gives_the_references_output_losses_and_gradients(search, make_layer):
    policies = NO_POLICY, BALANCED, *BY_POSITION, *TILES
    claim = lambda case: _check_against_the_reference(case, make_layer, "torch")
    search(claim, 16, *policies, terms=TERMS, lengths=(7, 13, 1, 0, 2))


def test_the_triton_kernels_give_the_references_output_losses_and_gradients(make_layer):
    """A few: interpreted they are slow."""
    policies = NO_POLICY, *BY_POSITION, *TILES
    any_case = st.sampled_from([*PRESETS.values()]).flatmap(lambda each: cases(each, policies, TERMS, lengths=(3, 1)))
    claim = lambda case: _check_against_the_reference(case, make_layer, "triton")
    settings(max_examples=10, phases=[Phase.generate])(given(any_case)(claim))()


def test_the_same_seed_gives_the_same_bits(search, make_layer):
    def claim(case):
        layer = case.layer(make_layer)
        first, again = _everything(case, layer, case.backend), _everything(case, layer, case.backend)
        assert first.keys() == again.keys()
        assert [name for name in first if not torch.equal(first[name], again[name])] == []

    search(claim, 6, NO_POLICY, *BY_POSITION, *BY_SCORE, *TILES, terms=TERMS)


@torch.no_grad()
def test_in_bf16_tokens_take_the_same_experts_and_the_output_keeps_its_scale(search, make_layer):
    """Scores are float32 there. Single roundings add up like random numbers: a third of the bound is usual."""

    def claim(case):
        layer, x_BSD = case.layer(make_layer, torch.bfloat16), case.x_BSD().bfloat16()
        out, report = case.run(layer, x_BSD)
        exact, report_exact = case.run(copy.deepcopy(layer).double(), x_BSD.double())
        assert _taken(report).keys() == _taken(report_exact).keys()
        assert (out - exact).norm() <= ROUNDINGS * exact.norm()
        assert abs(out.double().norm() - exact.norm()) <= ROUNDINGS / 2 * exact.norm()

    search(claim, 8, NO_POLICY, training=[False], lengths=[40])


# --- Time -------------------------------------------------------------------------------------------------------------


def _router(preset):
    return build_router(preset.router, 12, MoEConfig(**next(_sizes(preset))), vocab_size=17)


@torch.no_grad()
def test_what_comes_later_changes_nothing_that_came_before(search, make_model, preset):
    router = _router(preset)
    promises = {False: router.causal_in_eval, True: router.causal and "depth" not in preset.moe}
    if not any(promises.values()):
        pytest.skip("the router promises nothing of the kind")

    def claim(case):
        model, tokens_BS = case.model(make_model), case.tokens_BS()
        place_BS = torch.arange(tokens_BS.numel()).view(case.shape)
        if case.policy == "none":
            place_BS %= case.shape[1]  # policies serve the sequences of a batch one after the other
        late_BS = place_BS >= case.seed % (place_BS.max() + 1)
        logits = []
        for each_BS in (tokens_BS, torch.where(late_BS, (tokens_BS + 1 + place_BS % 16) % 17, tokens_BS)):
            torch.manual_seed(case.seed)
            logits.append(model(each_BS, backend=case.backend).logits_BSV)
        assert (logits[0] - logits[1])[late_BS].abs().max() > 1e-6
        torch.testing.assert_close(logits[0][~late_BS], logits[1][~late_BS], rtol=0, atol=1e-12)

    promised = [each for each in promises if promises[each]]
    search(claim, 8, NO_POLICY, BALANCED, *BY_POSITION, training=promised)


@torch.no_grad()
def test_a_token_takes_the_same_experts_with_a_cache_as_at_once(search, make_model, preset):
    if not _router(preset).per_token:
        pytest.skip("the router decides over what it is given at once")

    def claim(case):
        model, tokens_BS = case.model(make_model), case.tokens_BS()
        cache = KVCache(model.cfg, case.shape[0], torch.float64, tokens_BS.device)
        pieces = tokens_BS.split(1 + case.seed % 4, dim=1)
        taken = [model(each_BS, cache=cache, backend=case.backend).routing for each_BS in pieces]
        for at_once, *parts in zip(model(tokens_BS, backend=case.backend).routing, *taken, strict=True):
            expert_BSK = torch.cat([each.expert.unflatten(0, (case.shape[0], -1)) for each in parts], 1)
            assert torch.equal(expert_BSK.flatten(0, 1), at_once.expert)

    search(claim, 6, NO_POLICY, training=[False])
