"""Capacity, overflow, token rounding and imposed experts against loops over rows, and what must not leak or change."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from moe.config.balance import BalanceConfig
from moe.config.router import RouterConfig
from moe.routing import policies
from moe.routing.contract import DROPPED, UNUSED, Routing, probabilities

SIZES = {"n_tokens": st.integers(0, 9), "n_experts": st.integers(1, 6), "seed": st.integers(0, 2**31)}
PRIORITIES = st.sampled_from(["position", "score"])
OVERFLOWS = st.sampled_from(["residual", "next"])
FACTORS = st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.25, 2.0])
EVERY_LIMIT = [(priority, overflow) for priority in ("position", "score") for overflow in ("residual", "next")]


def _routing(n_tokens, n_experts, k, seed, *, score="softmax", renormalize=True, holes=0.3, skew=1.5):
    """A random (T, K) routing in float64: some experts wanted more, equal weights now and then, some rows UNUSED."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator, dtype=torch.float64)
    logits = ((logits + skew * torch.linspace(1, -1, n_experts)) * 2).round() / 2
    expert, weight, lse, prob = reference.gate(logits, min(k, n_experts), score, None, renormalize)
    hole = torch.rand(expert.shape, generator=generator) < holes
    return Routing(expert.masked_fill(hole, UNUSED), weight, None, logits, lse, prob, score)


def _ragged(routing):
    """The same rows, the UNUSED ones left out."""
    token, expert, weight = routing.rows()
    live = expert >= 0
    return routing._replace(token_N=token[live], expert=expert[live], weight=weight[live])


def _counts(routing, n_experts):
    return reference.count(routing.rows()[1], n_experts).tolist()


def _same(a, b):
    """Bitwise the same decision."""
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in zip(a[:3], b[:3], strict=True)  # expert, weight, token_N
    )


def _every_policy(n_experts):
    for priority, overflow in EVERY_LIMIT:
        yield f"{priority}-{overflow}", lambda r, p=priority, o=overflow: policies.limit(r, n_experts, 0.7, p, o)
    yield "tile", lambda r: policies.round_to_tile(r, n_experts, 3)
    yield "balanced", lambda r: policies.balanced(r)
    yield "recorded", lambda r: policies.recorded(r, (r.expert + 1).remainder(n_experts))


# -- capacity


@given(st.integers(1, 400), st.integers(0, 5000), st.integers(1, 256))
def test_capacity_is_the_share_of_the_rows_rounded_up_exactly(hundredths, n_rows, n_experts):
    factor = hundredths / 100
    exact = math.ceil(Fraction(str(factor)) * n_rows / n_experts)
    assert policies.capacity(factor, n_rows, n_experts) == max(1, exact)


def test_capacity_keeps_a_whole_share_whole_and_refuses_a_factor_of_zero():
    assert 1.1 * 100 / 10 > 11
    assert policies.capacity(1.1, 100, 10) == 11
    assert policies.capacity(math.inf, 7, 3) == 7
    assert policies.capacity(0.01, 7, 3) == policies.capacity(math.inf, 0, 3) == 1
    with pytest.raises(AssertionError, match=r"factor=0\.0"):
        policies.capacity(0.0, 7, 3)


# -- limit: who stays


def _oracle_stays(expert, weight, room, priority):
    """Expert of every row after dropping, by a loop over the rows in order of priority."""
    order = range(len(expert)) if priority == "position" else sorted(range(len(expert)), key=lambda n: (-weight[n], n))
    left, out = {}, list(expert)
    for n in order:
        if expert[n] < 0:
            continue
        left.setdefault(expert[n], room)
        if left[expert[n]] == 0:
            out[n] = DROPPED
        else:
            left[expert[n]] -= 1
    return out


@settings(max_examples=80, deadline=None)
@given(**SIZES, k=st.integers(1, 3), factor=FACTORS, ragged=st.booleans(), priority=PRIORITIES)
def test_an_expert_keeps_its_first_or_its_heaviest_rows(n_tokens, n_experts, seed, k, factor, ragged, priority):
    before = _routing(n_tokens, n_experts, k, seed)
    before = _ragged(before) if ragged else before
    after = policies.limit(before, n_experts, factor, priority, "residual")
    _, expert, weight = before.rows()
    room = policies.capacity(factor, len(expert), n_experts)
    assert after.rows()[1].tolist() == _oracle_stays(expert.tolist(), weight.tolist(), room, priority)
    assert after.expert.shape == before.expert.shape
    assert _same(after._replace(expert=before.expert), before)  # weights and tokens untouched
    kept = _counts(after, n_experts)
    assert max(kept) <= room
    assert kept == [min(c, room) for c in _counts(before, n_experts)]
    assert (after.expert == DROPPED).sum() + sum(kept) == sum(_counts(before, n_experts))
    assert torch.equal(after.expert == UNUSED, before.expert == UNUSED)


@pytest.mark.parametrize("router", [RouterConfig("relu"), RouterConfig("threshold", threshold=0.5)], ids=["relu", "p"])
def test_a_layers_capacity_is_a_share_of_k_rows_per_token_however_many_it_takes(make_layer, router):
    balance = BalanceConfig(aux=0.0, z=0.0, capacity=1.0)
    layer = make_layer(router, n_experts=5, k=2, balance=balance).train()
    x = torch.randn(1, 40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = layer(x, "reference")[1]
    assert report.wanted_E.max() > 16
    assert report.count_E.tolist() == [min(each, 16) for each in report.wanted_E.tolist()]  # 2 · 40 / 5


@settings(max_examples=40, deadline=None)
@given(**SIZES, k=st.integers(1, 3), choice=st.sampled_from(EVERY_LIMIT))
def test_without_a_limit_nothing_changes(n_tokens, n_experts, seed, k, choice):
    routing = _routing(n_tokens, n_experts, k, seed)
    assert _same(policies.limit(routing, n_experts, math.inf, *choice), routing)
    assert _same(policies.limit(routing, n_experts, float(n_experts), *choice), routing)


@settings(max_examples=60, deadline=None)
@given(**SIZES, k=st.integers(1, 3), factor=FACTORS, overflow=OVERFLOWS, cut=st.integers(0, 8))
def test_by_position_no_later_token_changes_an_earlier_ones_fate(n_tokens, n_experts, seed, k, factor, overflow, cut):
    a, b = _routing(n_tokens, n_experts, k, seed), _routing(n_tokens, n_experts, k, seed + 1)
    names = ("expert", "weight", "logits_TE")
    b = a._replace(**{name: torch.cat([getattr(a, name)[:cut], getattr(b, name)[cut:]]) for name in names})
    a, b = (policies.limit(r, n_experts, factor, "position", overflow) for r in (a, b))
    assert torch.equal(a.expert[:cut], b.expert[:cut])
    assert torch.equal(a.weight[:cut], b.weight[:cut])


def test_by_score_a_later_token_pushes_an_earlier_one_out():
    def first(logit):
        logits = torch.tensor([[1.0, 0.0], [logit, 0.0]])
        expert, weight, *_ = reference.gate(logits, 1, "softmax", None, False)
        assert expert.tolist() == [[0], [0]]
        return policies.limit(Routing(expert, weight, None, logits), 2, 1.0, "score", "residual").expert[0].item()

    assert first(0.5) == 0
    assert first(2.0) == DROPPED


# -- limit: where refused rows go


def _oracle_next(routing, room, priority):
    """Experts after overflow to the next best, token by token: (T, K) lists."""
    expert, logits = routing.expert.tolist(), routing.logits_TE.tolist()
    n_experts, k = routing.logits_TE.shape[1], routing.expert.shape[1]
    left = [room] * n_experts
    out = [list(row) for row in expert]
    settled = set()
    if priority == "score":
        weight = routing.weight.flatten().tolist()
        for n, e in enumerate(_oracle_stays(routing.expert.flatten().tolist(), weight, room, priority)):
            if e >= 0:
                settled.add((n // k, n % k))
                left[e] -= 1
    for t in range(len(expert)):
        refused = []
        for j, e in enumerate(expert[t]):
            if e < 0 or (t, j) in settled:
                continue
            if left[e]:
                left[e] -= 1
            else:
                refused.append(j)
        for j in refused:
            best = None
            for e in range(n_experts):  # the best by logits, ties to the lower index
                free = left[e] > 0 and e not in expert[t] and e not in out[t]
                if free and (best is None or logits[t][e] > logits[t][best]):
                    best = e
            out[t][j] = DROPPED if best is None else best
            if best is not None:
                left[best] -= 1
    return out, left


@settings(max_examples=200, deadline=None)
@given(
    n_tokens=st.integers(0, 14),
    n_experts=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    k=st.integers(1, 4),
    factor=FACTORS,
    priority=PRIORITIES,
    score=st.sampled_from(["softmax", "sigmoid"]),
)
def test_refused_rows_go_to_the_next_best_expert_with_room(n_tokens, n_experts, seed, k, factor, priority, score):
    before = _routing(n_tokens, n_experts, k, seed, score=score)
    after = policies.limit(before, n_experts, factor, priority, "next")
    room = policies.capacity(factor, before.expert.numel(), n_experts)
    expected, left = _oracle_next(before, room, priority)
    assert after.expert.tolist() == expected
    assert max(_counts(after, n_experts)) <= room
    prob = before.prob_TE()
    for t, row in enumerate(after.expert.tolist()):
        used = [e for e in row if e >= 0]
        assert len(set(used)) == len(used), f"two rows of token {t} at one expert: {row}"
        if DROPPED in row:
            assert not [e for e in range(n_experts) if left[e] and e not in used], f"token {t} dropped beside room"
        for j, e in enumerate(row):
            old, weight = before.expert[t, j].item(), before.weight[t, j]
            if e >= 0 and e != old:
                weight = weight * prob[t, e] / prob[t, old]
                torch.testing.assert_close(after.weight[t, j], weight, rtol=1e-12, atol=0)
            else:
                assert after.weight[t, j] == weight


@pytest.mark.parametrize("priority", ["position", "score"])
def test_a_refused_row_passes_by_its_tokens_other_expert_although_that_has_room(priority):
    logits = torch.tensor([[2.0, -1.0, 1.0, -1.0]] * 2 + [[1.0, 1.0, 0.5, 0.0]], dtype=torch.float64)
    expert, weight, lse, prob = reference.gate(logits, 2, "softmax")
    assert expert.tolist() == [[0, 2], [0, 2], [0, 1]]
    after = policies.limit(Routing(expert, weight, None, logits, lse, prob), 4, 1.0, priority, "next")  # C = 2
    assert after.expert.tolist() == [[0, 2], [0, 2], [3, 1]]


def test_enough_room_in_total_leaves_no_row_of_one_choice_behind():
    routing = _routing(24, 6, 1, 0, holes=0.0, skew=9.0)
    assert _counts(routing, 6) == [24, 0, 0, 0, 0, 0]
    after = policies.limit(routing, 6, 1.0, "position", "next")
    assert _counts(after, 6) == [4] * 6


def _chosen(logits, expert, score="softmax"):
    """A routing whose choice is fixed and whose weights are the logits' (renormalised) probabilities."""
    prob = probabilities(logits, score)
    weight = prob.gather(1, expert.clamp_min(0)) * (expert >= 0)
    return Routing(expert, weight / weight.sum(1, keepdim=True), None, logits, score=score)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["position-next", "score-next", "tile", "balanced", "recorded"])
def test_weights_of_changed_rows_carry_gradients_to_the_logits(name, score):
    plain = _routing(6, 4, 2, 3, holes=0.0, skew=2.0)
    logits = plain.logits_TE + torch.linspace(0, 0.5, 24, dtype=torch.float64).square().view(6, 4)  # no ties
    expert = reference.gate(logits, 2, "softmax")[0]
    policy = dict(_every_policy(4))[name]
    assert not torch.equal(policy(_chosen(logits, expert)).expert, expert)
    assert torch.autograd.gradcheck(lambda z: policy(_chosen(z, expert, score)).weight, logits.requires_grad_())


@pytest.mark.parametrize("name", ["position-next", "score-next", "tile", "balanced", "recorded"])
def test_probabilities_that_underflow_leave_gradients_finite(name):
    logits = torch.tensor([[300.0, -300.0, 0.0]] * 4, requires_grad=True)
    routing = _chosen(logits, torch.tensor([[1, 2], [0, 2], [0, 1], [0, 2]]))
    routing = routing._replace(weight=logits.softmax(-1).gather(1, routing.expert))
    after = dict(_every_policy(3))[name](routing)
    after.weight.sum().backward()
    assert after.weight.isfinite().all()
    assert logits.grad.isfinite().all()


def test_overflow_to_the_next_best_needs_scores_and_a_fixed_k():
    routing = _routing(4, 3, 2, 0)
    for refused in (_ragged(routing), routing._replace(logits_TE=None)):
        with pytest.raises(ValueError, match="overflow='next' needs"):
            policies.limit(refused, 3, 1.0, "position", "next")
    with pytest.raises(ValueError, match=r"priority='random' .* position, score"):
        policies.limit(routing, 3, 1.0, "random", "residual")
    with pytest.raises(ValueError, match=r"overflow='spill' .* residual, next"):
        policies.limit(routing, 3, 1.0, "score", "spill")


# -- tiles


def _oracle_tile(routing, n_experts, tile):
    """{(token, expert): weight} after rounding, by loops."""
    rows = [(t, e, w) for t, e, w in zip(*(x.tolist() for x in routing.rows()), strict=True) if e >= 0]
    prob = routing.prob_TE().tolist()
    scale = []
    for t in range(len(prob)):
        mass, of = sum(w for u, _, w in rows if u == t), sum(prob[t][e] for u, e, _ in rows if u == t)
        scale.append(mass / of if of else 1.0)
    out = {}
    for e in range(n_experts):
        mine = [(t, w) for t, f, w in rows if f == e]
        others = sorted((t for t in range(len(prob)) if t not in dict(mine)), key=lambda t: (-prob[t][e], t))
        over = len(mine) % tile
        if 2 * over >= tile and len(others) >= tile - over:
            mine += [(t, prob[t][e] * scale[t]) for t in others[: tile - over]] if over else []
        else:
            mine = sorted(mine, key=lambda row: -row[1])[: len(mine) - over]
        out |= {(t, e): w for t, w in mine}
    return out


@settings(max_examples=120, deadline=None)
@given(
    n_tokens=st.integers(0, 14),
    n_experts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    k=st.integers(1, 3),
    tile=st.integers(1, 8),
    ragged=st.booleans(),
    options=st.sampled_from([("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]),
)
def test_every_expert_has_the_nearest_whole_number_of_tiles(n_tokens, n_experts, seed, k, tile, ragged, options):
    before = _routing(n_tokens, n_experts, k, seed, score=options[0], renormalize=options[1])
    before = _ragged(before) if ragged else before
    after = policies.round_to_tile(before, n_experts, tile)
    assert all(c % tile == 0 for c in _counts(after, n_experts))
    assert len(after.expert) == before.expert.numel() + n_experts * min(tile // 2, n_tokens)
    assert (after.token_N.diff() >= 0).all()
    expected = _oracle_tile(before, n_experts, tile)
    got = {(t, e): w for t, e, w in zip(*(x.tolist() for x in after.rows()), strict=True) if e >= 0}
    assert got.keys() == expected.keys()
    assert sum(_counts(after, n_experts)) == len(got), "a token twice at one expert"
    if not ragged:
        added_unused = (after.expert == UNUSED).sum() - (before.expert == UNUSED).sum()
        assert ((after.expert == UNUSED) & (after.weight == 0)).sum() >= added_unused
    assert got == pytest.approx(expected, rel=1e-12)


def test_half_a_tile_rounds_up_and_less_rounds_down():
    """Counts 2, 1, 0 of 8 tokens, in tiles of 4: two tokens are added to the first expert, the second loses its row."""
    logits = torch.linspace(0, 1, 24).view(8, 3).requires_grad_()
    expert = torch.tensor([[0], [0], [1]] + [[UNUSED]] * 5)
    after = policies.round_to_tile(_chosen(logits, expert)._replace(weight=torch.ones(8, 1)), 3, 4)
    assert _counts(after, 3) == [4, 0, 0]
    assert (after.expert == DROPPED).sum() == 1
    assert (after.expert == UNUSED).sum() == 5 + 6 - 2


def test_without_scores_there_is_no_token_to_add():
    with pytest.raises(ValueError, match="needs a router with scores"):
        policies.round_to_tile(_routing(4, 3, 2, 0)._replace(logits_TE=None), 3, 2)


# -- imposed experts


@settings(max_examples=60, deadline=None)
@given(**SIZES, k=st.integers(1, 3), ragged=st.booleans())
def test_forced_balance_is_even_distinct_and_keeps_each_tokens_weight(n_tokens, n_experts, seed, k, ragged):
    before = _routing(n_tokens, n_experts, k, seed)
    before = _ragged(before) if ragged else before
    after = policies.balanced(before)
    count = _counts(after, n_experts)
    assert max(count) - min(count) <= 1
    assert sum(count) == sum(_counts(before, n_experts))
    prob = before.prob_TE()
    for t in range(n_tokens):
        mine = [(e, w) for u, e, w in zip(*after.rows(), strict=True) if u == t and e >= 0]
        mass = sum(w for u, e, w in zip(*before.rows(), strict=True) if u == t and e >= 0)
        experts = [int(e) for e, _ in mine]
        assert len(set(experts)) == len(experts)
        of = sum(prob[t, e] for e in experts)
        for e, w in mine:
            torch.testing.assert_close(w, mass * prob[t, e] / of, rtol=1e-12, atol=0)


def test_forced_balance_deals_the_rows_in_turn():
    routing = _routing(3, 4, 2, 0, holes=0.0)
    assert policies.balanced(routing).expert.tolist() == [[0, 1], [2, 3], [0, 1]]
    blind = policies.balanced(routing._replace(logits_TE=None), 3)
    assert blind.expert.tolist() == [[0, 1], [2, 0], [1, 2]]
    assert torch.equal(blind.weight, routing.weight)
    with pytest.raises(ValueError, match="give n_experts"):
        policies.balanced(routing._replace(logits_TE=None))


@settings(max_examples=60, deadline=None)
@given(**SIZES, k=st.integers(1, 3), score=st.sampled_from(["softmax", "sigmoid"]), renormalize=st.booleans())
def test_replaying_a_routings_own_experts_changes_nothing(n_tokens, n_experts, seed, k, score, renormalize):
    routing = _routing(n_tokens, n_experts, k, seed, score=score, renormalize=renormalize)
    again = policies.recorded(routing, routing.expert)
    assert torch.equal(again.expert, routing.expert)
    torch.testing.assert_close(again.weight, routing.weight * (routing.expert >= 0), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(**SIZES, k=st.integers(1, 3), priority=st.sampled_from(["position", "score"]))
def test_replaying_what_capacity_left_of_a_routing_drops_the_same_rows_again(n_tokens, n_experts, seed, k, priority):
    routing = _routing(n_tokens, n_experts, k, seed, holes=0.0)
    left = policies.limit(routing, n_experts, 0.5, priority, "residual")
    again = policies.recorded(routing, left.expert)
    assert torch.equal(again.expert, left.expert)
    assert torch.equal(again.weight, left.weight * (left.expert >= 0))


def test_replayed_experts_get_their_own_probabilities_on_the_tokens_scale():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    expert, weight, *_ = reference.gate(logits, 2, "softmax", None, True, 2.5)
    after = policies.recorded(
        Routing(expert, weight, None, logits), torch.tensor([[0, 1], [DROPPED, 3]], dtype=torch.int64)
    )
    assert after.expert.tolist() == [[0, 1], [DROPPED, 3]]
    expected = [[2.5 / 3, 5 / 3], [0, 2.5]]
    torch.testing.assert_close(after.weight, torch.tensor(expected, dtype=torch.float64))


def test_replay_without_scores_keeps_the_weights_and_shapes_must_agree():
    routing = _routing(2, 4, 2, 0, holes=0.0)
    blind = policies.recorded(routing._replace(logits_TE=None), torch.tensor([[3, UNUSED], [1, 0]]))
    assert blind.weight.tolist() == [[routing.weight[0, 0], 0], routing.weight[1].tolist()]
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        policies.recorded(routing, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="fixed K"):
        policies.recorded(_ragged(routing), torch.zeros(4, dtype=torch.int64))


# -- every policy


@pytest.mark.parametrize("name", dict(_every_policy(3)))
def test_no_token_no_expert_and_one_expert_for_all(name):
    policy = dict(_every_policy(3))[name]
    empty = policy(_routing(0, 3, 2, 0))
    assert empty.expert.numel() == empty.weight.numel() == 0

    unused = _routing(5, 3, 2, 0)
    unused = unused._replace(expert=torch.full_like(unused.expert, UNUSED))
    if name == "tile":
        assert (policy(unused).expert == UNUSED).all()
    elif name != "recorded":
        assert torch.equal(policy(unused).expert, unused.expert)

    hot = _routing(5, 3, 1, 0, holes=0.0, skew=9.0)
    assert _counts(hot, 3) == [5, 0, 0]
    expected = {
        "position-residual": [2, 0, 0],
        "score-residual": [2, 0, 0],
        "position-next": [2, 2, 1],
        "score-next": [2, 2, 1],
        "tile": [3, 0, 0],  # up is 6, of 5 tokens
        "balanced": [2, 2, 1],
        "recorded": [0, 5, 0],
    }
    assert _counts(policy(hot), 3) == expected[name]


@pytest.mark.parametrize("name", dict(_every_policy(5)))
def test_every_policy_compiles_whole_and_is_the_same(name):
    policy = dict(_every_policy(5))[name]
    routing = _routing(12, 5, 2, 0)
    torch._dynamo.reset()
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    assert _same(compiled(routing), policy(routing))
