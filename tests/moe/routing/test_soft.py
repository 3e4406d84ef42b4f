"""Soft MoE, against loops over numbers."""

import math

import pytest
import torch

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing.contract import Context
from moe.routing.soft import SoftRouter
from tests.moe.routing.batch_routers import (
    D,
    E,
    make_router,
    route,
    states,
)


def test_soft_dispatch_sums_to_one_over_tokens_and_combine_over_slots():
    router = make_router("soft", slots=3)
    mixture = route(router, states(24), n_sequences=4)
    assert mixture.dispatch_BSEP.shape == mixture.combine_BSEP.shape == (4, 6, E, 3)
    torch.testing.assert_close(mixture.dispatch_BSEP.sum(1), torch.ones(4, E, 3).double())
    torch.testing.assert_close(mixture.combine_BSEP.sum((2, 3)), torch.ones(4, 6).double())


def test_soft_equals_a_loop_over_numbers():
    router, x_TD = make_router("soft", slots=2, n_experts=3), states(8)
    with torch.no_grad():
        router.gain.fill_(3.0)
    mixture = route(router, x_TD, n_sequences=2)

    def cosine(a, b):
        return sum(map(lambda u, v: u * v, a, b)) / math.hypot(*a) / math.hypot(*b)

    for b in range(2):
        x, phi = x_TD[4 * b : 4 * b + 4].tolist(), router.w_phi.tolist()
        weight = [[[math.exp(3 * cosine(x[s], phi[e][p])) for p in range(2)] for e in range(3)] for s in range(4)]
        for s in range(4):
            total = sum(map(sum, weight[s]))
            for e in range(3):
                for p in range(2):
                    column = sum(weight[r][e][p] for r in range(4))
                    assert mixture.dispatch_BSEP[b, s, e, p].item() == pytest.approx(weight[s][e][p] / column)
                    assert mixture.combine_BSEP[b, s, e, p].item() == pytest.approx(weight[s][e][p] / total)


def test_soft_ignores_the_length_of_states_and_slots_and_other_sequences():
    router, x_TD = make_router("soft", slots=2), states(12)
    plain = route(router, x_TD, n_sequences=3)
    torch.testing.assert_close(route(router, x_TD[4:8]).dispatch_BSEP[0], plain.dispatch_BSEP[1])
    with torch.no_grad():
        router.w_phi.mul_(7.0)
    scaled = route(router, 5 * x_TD, n_sequences=3)
    torch.testing.assert_close(scaled.dispatch_BSEP, plain.dispatch_BSEP)
    torch.testing.assert_close(scaled.combine_BSEP, plain.combine_BSEP)


@pytest.mark.parametrize(
    ("slots", "n_experts", "k", "context", "expected"),
    [(3, 4, 2, 16, 3), (0, 4, 2, 16, 8), (0, 4, 1, 17, 5), (0, 4, 2, 0, 1), (0, 4, 4, 16, 16)],
)
def test_soft_has_the_slots_it_is_given_else_as_many_as_k_experts_cost(slots, n_experts, k, context, expected):
    cfg, moe = RouterConfig(name="soft", slots=slots), MoEConfig(n_experts=n_experts, k=k)
    router = SoftRouter(cfg, D, moe, context=context)
    assert router.w_phi.shape == (n_experts, expected, D)
    assert router.gain.shape == (1,)
    assert router.gain.item() == 1


def test_soft_refuses_tokens_that_are_not_sequences_of_one_length():
    with pytest.raises(AssertionError, match="7 tokens are not 2 sequences"):
        route(make_router("soft"), states(7), n_sequences=2)
    with pytest.raises(AssertionError, match="there is no sequence"):
        route(make_router("soft"), states(0), n_sequences=0)


def test_soft_gradients_are_derivatives():
    router = make_router("soft", slots=2, n_experts=2)

    def both(x_TD, w_phi, gain):
        call = torch.func.functional_call
        return call(router, {"w_phi": w_phi, "gain": gain}, (x_TD, "reference", Context(n_sequences=2)))

    assert torch.autograd.gradcheck(both, (states(6).requires_grad_(), router.w_phi, router.gain))
