"""Claims about Muon. Oracles: torch.optim.Muon for one matrix, the singular values in float64 for the iteration."""

import pytest
import torch

from moe.train.muon import COEFFICIENTS, Muon, orthogonalize, rate_ratio

SETTINGS = dict(lr=0.03, weight_decay=0.2, momentum=0.9, ns_steps=5)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quintic(s, steps):
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 7)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_each_matrix_keeps_its_singular_vectors_and_its_values_go_through_the_quintic(shape, steps):
    x_MRC = normal(4, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 5.0, 1e4])[:, None, None]
    for x, found in zip(x_MRC, orthogonalize(x_MRC, steps), strict=True):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        expected = u @ torch.diag(quintic(s / s.norm(), steps)) @ vt
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_five_steps_bring_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(normal(3, 32, 48), 5))
    assert ((values > 0.6) & (values < 1.3)).all()


def step_both(shape, adjust, parts, dtype, n_steps=3):
    """A stack under Muon, and each of its matrices under an oracle's Muon of its own."""
    p = torch.nn.Parameter(normal(*shape))
    ours = Muon([{"params": [p], "parts": parts}], adjust=adjust, dtype=dtype, **SETTINGS)
    matrices = [m for stack in p.detach().reshape(-1, *shape[-2:]) for m in stack.chunk(parts)]
    theirs = [torch.nn.Parameter(m.clone()) for m in matrices]
    oracle = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **SETTINGS)
    for step in range(n_steps):
        p.grad = normal(*shape, seed=step + 1)
        gradients = [m for stack in p.grad.reshape(-1, *shape[-2:]) for m in stack.chunk(parts)]
        for q, gradient in zip(theirs, gradients, strict=True):
            q.grad = gradient.clone()
        ours.step()
        oracle.step()
    return p.detach(), torch.cat([q.detach() for q in theirs]).view(shape)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    ("shape", "parts"), [((24, 16), 1), ((16, 24), 1), ((32, 8), 2), ((3, 24, 16), 1), ((3, 16, 24), 2)], ids=str
)
def test_steps_are_torchs_for_a_matrix_for_every_expert_and_for_gate_and_up_apart(shape, parts, adjust):
    """torch orthogonalises in bfloat16, whose rounding is all that may differ."""
    ours, theirs = step_both(shape, adjust, parts, torch.bfloat16)
    moved = (theirs - normal(*shape)).abs().max()
    assert (ours - theirs).abs().max() < 0.01 * moved


def test_the_arithmetic_of_a_processor_is_float32():
    ours, theirs = step_both((3, 24, 16), "original", 1, None)
    moved = (theirs - normal(3, 24, 16)).abs().max()
    assert 0 < (ours - theirs).abs().max() < 0.1 * moved
    assert torch.equal(ours, step_both((3, 24, 16), "original", 1, torch.float32)[0])


def test_one_experts_gradient_moves_no_other_and_none_at_all_moves_nothing():
    p = torch.nn.Parameter(normal(3, 8, 6))
    before = p.detach().clone()
    optimizer = Muon([{"params": [p]}], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    p.grad[1] = normal(8, 6, seed=1)
    optimizer.step()
    assert torch.equal(p[0], before[0])
    assert torch.equal(p[2], before[2])
    assert not torch.equal(p[1], before[1])
    after, p.grad = p.detach().clone(), None
    optimizer.step()
    assert torch.equal(p, after)


def test_a_matched_rate_gives_updates_of_the_size_of_adamws():
    """0.2 is the root mean square that 2502.16982 found AdamW's updates to have."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        update = orthogonalize(normal(1, *shape), 5) * rate_ratio("match_rms_adamw", *shape)
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_an_unknown_adjustment_is_no_rule():
    with pytest.raises(ValueError, match="adjust='none'"):
        rate_ratio("none", 2, 2)
