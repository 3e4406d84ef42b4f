"""The Sinkhorn router, against loops over numbers."""

import math

import pytest
import torch

from moe.routing.sinkhorn import sinkhorn
from tests.moe.routing.batch_routers import (
    D,
    E,
    make_router,
    route,
    states,
)


def test_sinkhorns_columns_are_exact_and_its_rows_converge():
    logits_TE = 2 * torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in (1, 4, 16, 64):
        balanced_TE = sinkhorn(logits_TE, iterations).exp()
        torch.testing.assert_close(balanced_TE.sum(0), torch.full((5,), 6.0).double(), rtol=1e-12, atol=0)
        errors.append((balanced_TE.sum(1) - 1).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_sinkhorn_only_scales_rows_and_columns():
    """log of the ratio to exp(logits) is a sum of a term per row and one per column."""
    logits_TE = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor_TE = sinkhorn(logits_TE, 8) - logits_TE
    mixed_TE = factor_TE - factor_TE[:, :1] - factor_TE[:1] + factor_TE[0, 0]
    torch.testing.assert_close(mixed_TE, torch.zeros_like(mixed_TE), rtol=0, atol=1e-12)


def test_sinkhorn_equals_a_loop_over_numbers():
    logits_TE = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = [[math.exp(v) for v in row] for row in logits_TE.tolist()]
    for _ in range(8):
        table = [[v / sum(row) for v in row] for row in table]
        total = [sum(row[e] for row in table) for e in range(3)]
        table = [[row[e] / total[e] * 7 / 3 for e in range(3)] for row in table]
    torch.testing.assert_close(sinkhorn(logits_TE, 8).exp(), torch.tensor(table).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_is_finite_for_any_logits(bad, dtype):
    logits_TE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_TE[2, 1] = bad
    logits_TE[3] = bad
    logits_TE[:, 3] = bad
    assert sinkhorn(logits_TE, 8).isfinite().all()


def test_sinkhorn_loads_are_more_even_than_the_logits():
    router = make_router("sinkhorn", k=1, iterations=50, renormalize=False)
    x_TD = states(400) + 0.7  # a shift that all tokens share favours some experts
    load = {}
    for training in (True, False):
        load[training] = torch.bincount(route(router.train(training), x_TD).expert.flatten(), minlength=E).max().item()
    assert load[True] < 0.7 * load[False]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_takes_the_best_of_the_balanced_scores_weighted_by_the_plain_ones(renormalize, training):
    router = make_router("sinkhorn", k=2, renormalize=renormalize, scale=2.5).train(training)
    x_TD = states()
    routing = route(router, x_TD)
    logits_TE = (x_TD @ router.w_ED.T).detach()
    rank_TE = sinkhorn(logits_TE, 8) if training else logits_TE
    for t in range(len(x_TD)):
        chosen = sorted(range(E), key=lambda e: (-rank_TE[t, e].item(), e))[:2]
        prob = [math.exp(v) for v in logits_TE[t].tolist()]
        weight = [prob[e] / sum(prob) for e in chosen]
        weight = [2.5 * w / (sum(weight) if renormalize else 1) for w in weight]
        assert routing.expert[t].tolist() == chosen
        assert routing.weight[t].tolist() == pytest.approx(weight, rel=1e-12)


def test_with_equal_scores_sinkhorn_takes_the_lower_experts():
    routing = route(make_router("sinkhorn", k=2), torch.zeros(6, D, dtype=torch.float64))
    assert routing.expert.tolist() == [[0, 1]] * 6
    assert routing.weight.tolist() == [[0.5, 0.5]] * 6
