"""Claims about how alike experts are: planted copies, rotations and permutations, and CKA by its textbook formula."""

import numpy as np
import pytest
import torch

from kernels import reference
from moe.analysis.redundancy import layer_states, linear_cka, output_cosine, outputs, redundancy, weight_cosine
from moe.config.model import MoEConfig
from moe.errors import BadInput
from tests.router_presets import presets_of_routers
from tests.small_layers import EXACT, model_of

PRESETS = presets_of_routers()


def _windows(n=3):
    tokens = np.random.default_rng(0).integers(0, 17, (n, 4, 17))
    place = np.zeros((4, 16), int)
    return [(read_BS1, place, place, place) for read_BS1 in tokens]


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model(make_model):
    """A tiny model in whose last layer expert 2 is a copy of 0, 3 one with its hidden units in another order, and 4 one
    whose output is turned; in expert 1 nothing is planted."""
    model = make_model().eval().requires_grad_(False)
    up_EFD, down_EDF = model.blocks[1].mlp.experts.w_up_EFD, model.blocks[1].mlp.experts.w_down_EDF
    up_EFD[2:] = up_EFD[0].clone()
    down_EDF[2:] = down_EDF[0].clone()
    order_F = torch.arange(6, -1, -1)
    up_EFD[3], down_EDF[3] = up_EFD[0][torch.cat([order_F, order_F + 7])], down_EDF[0][:, order_F]  # gates, then ups
    down_EDF[4] = torch.linalg.qr(_random(12, 12)).Q @ down_EDF[0]
    return model


def test_a_copy_is_found_in_any_order_of_hidden_units_and_a_turned_one_by_cka_alone(model):
    first, last = redundancy(model, _windows(), most=100)
    assert (first.layer, last.layer, last.tokens) == (0, 1, 100)
    assert last.cosine_EE[0, [0, 2, 3]] == pytest.approx(1)
    assert abs(last.cosine_EE[0, 4]) < 0.9
    assert last.cka_EE[0, [0, 2, 3, 4]] == pytest.approx(1)
    assert last.cka_EE[0, 1] < 0.9
    assert last.weights_EE[0, [0, 2]] == pytest.approx(1)
    assert last.weights_EE[0, 3] < 0.6  # the control does not see it
    for e in (0, 2, 3):  # of three that are the same, either other one
        assert last.twin_E[e].item() in {0, 2, 3} - {e}
    assert np.abs(first.cosine_EE - np.eye(5)).max() < 0.9
    for matrix_EE in (last.cosine_EE, last.cka_EE, last.weights_EE):
        assert matrix_EE == pytest.approx(matrix_EE.T)
        assert np.diag(matrix_EE) == pytest.approx(1)


def test_in_another_order_of_tokens_copies_are_no_more_alike_than_chance(model):
    last = redundancy(model, _windows(), most=1000)[1]
    assert last.tokens == 3 * 4 * 16
    assert last.chance_cka < 0.2 < last.cka_EE[0, 2]
    assert last.chance_cosine < 0.3 < last.cosine_EE[0, 2]


@pytest.mark.parametrize("shape", [(4, 30, 6), (4, 6, 30), (3, 8, 8)], ids=["T > D", "T < D", "T = D"])
def test_cka_is_that_of_centred_gram_matrices(shape):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(K H L H), H = 1 − 11ᵀ/T."""
    (e, t, _), y, other = shape, _random(*shape), _random(*shape, seed=1) + 3
    h = np.eye(t) - 1 / t
    gram = lambda z_TD: (z_TD @ z_TD.T).numpy()
    hsic = lambda one, two: np.trace(one @ h @ two @ h)
    cka = linear_cka(y, other)
    for i in range(e):
        for j in range(e):
            one, two = gram(y[i]), gram(other[j])
            assert cka[i, j].item() == pytest.approx(hsic(one, two) / np.sqrt(hsic(one, one) * hsic(two, two)))


def test_a_cosine_is_the_mean_of_the_tokens_cosines():
    y, other = _random(3, 7, 5), _random(3, 7, 5, seed=1)
    cosine = output_cosine(y, other)
    for i in range(3):
        for j in range(3):
            by_token = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(y[i], other[j], strict=True)]
            assert cosine[i, j].item() == pytest.approx(np.mean(by_token))


@pytest.mark.parametrize("moe", [{}, {"widths": [3, 7, 3, 9, 7]}], ids=["one width", "mixed widths"])
def test_an_experts_output_is_its_mlp_of_the_token(make_model, moe):
    layer = make_model(moe=MoEConfig(n_experts=5, k=3, d_expert=7, **moe)).blocks[0].mlp
    x_TD = _random(6, 12)
    with torch.no_grad():
        y_ETD = outputs(layer, x_TD)
    for e in range(5):
        stack, local = layer.experts, e
        if moe:
            (g,) = [g for g in range(3) if layer.experts.local_GE[g, e] >= 0]
            stack, local = layer.experts.stacks[g], layer.experts.local_GE[g, e]
        hidden = reference.activate(x_TD @ stack.w_up_EFD[local].T, "swiglu")
        torch.testing.assert_close(y_ETD[e], hidden @ stack.w_down_EDF[local].T, **EXACT)


def test_weights_of_other_widths_cannot_be_compared(make_model):
    layer = make_model(moe=MoEConfig(n_experts=5, k=3, d_expert=7, widths=[3, 7, 3, 9, 7])).blocks[0].mlp
    cosine_EE = weight_cosine(layer)
    known = torch.tensor([[i == j or {i, j} in ({0, 2}, {1, 4}) for j in range(5)] for i in range(5)])
    assert torch.equal(cosine_EE.isnan(), ~known)
    torch.testing.assert_close(cosine_EE.diagonal(), torch.ones(5, dtype=torch.float64))
    stack = layer.experts.stacks[0]
    one, other = (torch.cat([stack.w_up_EFD[i].flatten(), stack.w_down_EDF[i].flatten()]) for i in (0, 1))
    expected = torch.nn.functional.cosine_similarity(one, other, 0)
    torch.testing.assert_close(cosine_EE[0, 2], expected.detach(), **EXACT)


@pytest.mark.parametrize("name", ["softmax", "mod", "moepp", "soft", "expert-choice"])
def test_every_router_has_states_and_experts_to_compare(make_model, name):
    model = model_of(make_model, PRESETS[name])
    with torch.no_grad():
        states = layer_states(model, _windows())
    told = redundancy(model, _windows(), most=20)
    assert len(states) == len(told) == 2
    for state_TD, of_layer in zip(states, told, strict=True):
        assert (len(state_TD) < 192) == (name == "mod" and of_layer.layer == 1)  # those that enter
        assert of_layer.cosine_EE.shape == (model.blocks[0].mlp.n_experts,) * 2
        assert of_layer.tokens == 20


def test_a_single_expert_has_no_twin_and_a_dense_model_nothing_to_compare(make_model):
    alone = redundancy(make_model(moe=MoEConfig(n_experts=1, k=1, d_expert=7)), _windows(1))[0]
    assert alone.twin_E.tolist() == [-1]
    with pytest.raises(BadInput, match="dense"):
        redundancy(make_model(moe=None), _windows(1))
