"""The gate at the ends of the numbers: saturated scores, logits far below and above 0, infinities and NaN."""

import mpmath
import pytest
import torch

from kernels import reference
from kernels.gate import gate
from tests.kernels.test_gate import DTYPES, GROUPED, SCORES, TOLERANCE, both, draw, gradient
from tests.kernels.test_plan import DEVICE

# What NumPy remarks on the interpreter's infinities.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
]

CHOOSE = pytest.mark.parametrize("choose", [reference.gate, gate], ids=["reference", "triton"])


@DTYPES
def test_saturated_sigmoids_keep_the_references_choice_weights_and_gradients(dtype):
    logits = torch.tensor(
        [[800, 50, 60, -50, 0, -800], [-800, -50, -60, -800, -90, -700], [-800] * 6, [50, 60, 70, 80, 90, 100]],
        dtype=dtype, device=DEVICE, requires_grad=True,
    )  # fmt: skip
    got, want, exact = both(logits, 3, "sigmoid", None, True, 2.5)
    assert got[0].tolist() == [[0, 2, 1], [1, 2, 4], [0, 1, 2], [5, 4, 3]]
    assert torch.equal(got[0], want[0])
    if dtype == torch.float64:
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=0)
    else:  # e^-90 is not a normal float32
        torch.testing.assert_close(got[1].double()[[0, 3]], want[1][[0, 3]], rtol=1e-6, atol=0)
    mine, theirs = gradient(got, logits), gradient(want, exact)
    torch.testing.assert_close(mine[[0, 2, 3]].double(), theirs[[0, 2, 3]], rtol=TOLERANCE[dtype], atol=1e-6)
    assert mine.isfinite().all()


def test_scores_that_add_up_to_less_than_any_normal_number_are_divided_by_that():
    logits = torch.tensor([[-709.5, -709.6, -709.7]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    got, want, exact = both(logits, 2, "sigmoid")
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    assert 0.1 < got[1].sum() < 0.9
    for each in range(3):
        mine, theirs = gradient(got, logits, which=(each,)), gradient(want, exact, which=(each,))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@CHOOSE
@DTYPES
def test_sqrt_softplus_and_its_derivative_are_finite_and_exact_for_every_finite_logit(dtype, choose):
    """In float32 softplus is 0 below -104, and its root still has all its digits."""
    numbers = [-1e4, -1500, -800, -745, -200, -170, -104, -90, -41, -40, -39, -20, -3, -1e-3, 0, 1e-3, 3, 20, 90, 1e4]
    logits = torch.tensor([numbers], dtype=dtype, device=DEVICE, requires_grad=True)
    expert, weight, _, _ = choose(logits, len(numbers), "sqrt_softplus", renormalize=False)
    (slope,) = torch.autograd.grad(weight.sum(), logits)
    assert expert[0].tolist() == list(range(len(numbers)))[::-1]
    with mpmath.workprec(20_000):  # e^-10000 keeps its digits beside 1
        exact = [mpmath.mpf(z) for z in logits[0].tolist()]
        scores = [mpmath.sqrt(mpmath.log(1 + mpmath.exp(z))) for z in exact]
        slopes = [1 / (1 + mpmath.exp(-z)) / (2 * s) for z, s in zip(exact, scores, strict=True)]
    tolerance = dict(rtol=100 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    for mine, theirs in ((weight[0].flip(0), scores), (slope[0], slopes)):
        want = torch.tensor([float(each) for each in theirs], dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(mine.double(), want, **tolerance)
    assert (slope[0, 0], slope[0, 5] > 0) == (0, True)


def test_sqrt_softplus_weights_are_ratios_where_softplus_itself_underflows():
    logits = torch.tensor([[-150.0, -152, -160, -155]], device=DEVICE, requires_grad=True)
    got, want, exact = both(logits, 2, "sqrt_softplus")
    assert got[0].tolist() == [[0, 1]]
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient(got, logits).double(), gradient(want, exact), rtol=2e-5, atol=1e-6)


INF, NAN = float("inf"), float("nan")
KINDS = pytest.mark.parametrize(
    ("score", "biased", "rest"),
    [
        ("softmax", False, {}),
        ("softmax", True, {}),
        ("sigmoid", False, {}),
        ("sigmoid", True, dict(renormalize=False)),
        ("sigmoid", False, GROUPED),
        ("softmax", True, GROUPED),
        ("sqrt_softplus", False, {}),
        ("sqrt_softplus", True, dict(GROUPED, renormalize=False)),
    ],
)


@KINDS
def test_experts_at_minus_infinity_come_last_and_get_no_weight_and_no_gradient(score, biased, rest):
    logits = draw(5, 12)
    logits[:, [0, 4, 5, 9]] = -INF
    logits[4, :11] = -INF
    logits.requires_grad_()
    got, want, exact = both(logits, 8, score, torch.zeros(12, device=DEVICE) if biased else None, **rest)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    assert (got[1][got[0] == 0] == 0).all()
    mine = gradient(got, logits)
    torch.testing.assert_close(mine, gradient(want, exact), rtol=1e-12, atol=1e-13)
    assert (mine[:, [0, 4, 5, 9]] == 0).all()


@KINDS
def test_an_infinite_logit_is_chosen_and_shows_in_the_log_sum_exp(score, biased, rest):
    logits = draw(4, 12)
    logits[1, 7] = logits[2, 2] = INF
    got = gate(logits, 3, score, torch.zeros(12, device=DEVICE) if biased else None, **rest)
    assert got[2][1:3].tolist() == [INF, INF]
    assert got[2][[0, 3]].isfinite().all()
    if not biased:  # a bias is added to a softmax of NaN
        assert (got[0][1] == 7).any()
        assert (got[0][2] == 2).any()


@DTYPES
@CHOOSE
@pytest.mark.parametrize("rest", [{}, dict(renormalize=False), GROUPED], ids=["renormalised", "raw", "grouped"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_sigmoid_of_plus_infinity_is_one_and_of_minus_infinity_none_and_neither_moves(biased, rest, choose, dtype):
    logits = draw(5, 12, dtype=dtype)
    logits[0, 7] = logits[1, 2] = logits[1, 9] = logits[4, 3] = INF
    logits[2, 5] = logits[4, :3] = logits[4, 4:] = -INF
    logits[3] = -INF
    infinite, leaf = logits.isinf(), logits.clone().requires_grad_()
    bias = torch.zeros(12, dtype=dtype, device=DEVICE) if biased else None
    expert, weight, lse, prob_E = choose(leaf, 3, "sigmoid", bias, **rest)

    # The oracle: the scores by hand, and derivatives of the same with a number so large that its sigmoid is 1 or 0.
    far = logits.double().clamp(-1e4, 1e4).requires_grad_()
    score = far.sigmoid()
    chosen = score.gather(1, expert)
    scale = chosen.sum(1, keepdim=True).clamp_min(1e-300) if rest.get("renormalize", True) else 1.0
    want_prob = (score / score.sum(1, keepdim=True).clamp_min(1e-300)).sum(0)
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(weight.double(), chosen / scale, **tolerance)
    torch.testing.assert_close(prob_E.double(), want_prob, **tolerance)
    assert lse[[0, 1, 3, 4]].tolist() == [INF, INF, -INF, INF]
    assert lse[2].isfinite()
    (got,) = torch.autograd.grad((weight * draw(5, 3, dtype=dtype)).sum() + prob_E.square().sum(), leaf)
    (want,) = torch.autograd.grad((chosen / scale * draw(5, 3)).sum() + want_prob.square().sum(), far)
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert (got[infinite] == 0).all()
    assert got[~infinite].any()


@CHOOSE
@pytest.mark.parametrize(("score", "value"), [("softmax", INF), ("softmax", -INF), ("sqrt_softplus", INF)])
def test_what_an_infinite_row_leaves_undefined_is_nan_in_that_row_alone(score, value, choose):
    """A softmax of one, and infinite scores divided by their sum: what a run reads is that something went wrong."""
    logits = draw(3, 5)
    logits[1] = -INF
    logits[1, 2] = value
    leaf = logits.clone().requires_grad_()
    _, weight, lse, prob_E = choose(leaf, 2, score)
    assert weight.isnan().any(1).tolist() == [False, True, False]
    assert lse[1] == value
    assert prob_E.isnan().tolist() == [score == "softmax" or e == 2 for e in range(5)]
    (got,) = torch.autograd.grad(weight.square().sum(), leaf)
    assert got.isnan().any(1).tolist() == [False, True, False]


@SCORES
def test_an_infinite_log_sum_exp_has_the_references_gradient(score):
    logits = draw(3, 5)
    logits[0, 2] = INF
    logits[1] = -INF
    got, want, exact = both(leaf := logits.clone().requires_grad_(), 2, score)
    assert torch.equal(got[2][:2], want[2][:2])
    mine, theirs = (torch.autograd.grad(lse.sum(), each)[0] for lse, each in ((got[2], leaf), (want[2], exact)))
    # An infinite score, or a softmax of infinities, has made the whole row of the kernel NaN.
    rows = slice({"sigmoid": 0, "sqrt_softplus": 1, "softmax": 2}[score], None)
    torch.testing.assert_close(mine[rows], theirs[rows], rtol=1e-12, atol=1e-13, equal_nan=True)


@KINDS
@DTYPES
@pytest.mark.parametrize("k", [3, 8])
def test_whatever_the_logits_ids_are_distinct_and_in_range(k, dtype, score, biased, rest):
    rows = [[INF] * 12, [-INF] * 12, [NAN] * 12, [-NAN] * 12, [INF, -INF] * 6, [NAN, 1.0, -NAN] * 4]
    rows += [[0.0] * 11 + [each] for each in (INF, -INF, NAN, -NAN)]
    logits = torch.tensor(rows, dtype=dtype)
    ones = torch.full((2, 12), -1, dtype=torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)
    ones[1, ::2] = 0
    logits = torch.cat([logits, ones]).to(DEVICE)
    expert = gate(logits, k, score, torch.zeros(12, device=DEVICE) if biased else None, **rest)[0]
    for row in expert.tolist():
        assert len(set(row)) == k
        assert set(row) <= set(range(12))


def test_a_nan_row_leaves_the_other_rows_alone():
    logits = draw(40, 5)
    spoilt = logits.clone()
    spoilt[3] = NAN
    others = [t for t in range(40) if t != 3]
    for a, b in zip(gate(logits, 2, "softmax")[:3], gate(spoilt, 2, "softmax")[:3], strict=True):
        assert torch.equal(a[others], b[others])
