"""Rotary positions: what a rotation keeps, and angles equal to transformers' in every bit, scaled ones too."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe.config.model import ModelConfig, RopeScaling
from moe.model.rope import frequencies, rotary, rotate

SMALL = ModelConfig(context=32, d_model=8, n_heads=1)
SCALINGS = {
    "none": (RopeScaling(), {}),
    "linear": (RopeScaling("linear", 8.0), {"factor": 8.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "yarn": (RopeScaling("yarn", 40.0, 4096), {"factor": 40.0, "original_max_position_embeddings": 4096}),
    "yarn with its own numbers": (
        RopeScaling("yarn", 3.0, 100, beta_fast=20.0, beta_slow=2.0, truncate=False, attention_factor=1.5),
        {"factor": 3.0, "original_max_position_embeddings": 100, "beta_fast": 20.0, "beta_slow": 2.0}
        | {"truncate": False, "attention_factor": 1.5},
    ),
    "yarn of a short context": (RopeScaling("yarn", 2.0, 4), {"factor": 2.0, "original_max_position_embeddings": 4}),
}


def test_scores_depend_on_the_distance_alone():
    cos, sin = (angles.double() for angles in rotary(SMALL))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 32, 8)
    score = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]
    for distance in range(-5, 6):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


def test_of_a_fraction_the_first_channels_turn_as_if_they_were_the_head_and_the_rest_stays():
    whole, half = ModelConfig(context=32, head_dim=8), ModelConfig(context=32, head_dim=16, rope_fraction=0.5)
    x = torch.randn(2, 3, 32, 16)
    turned = rotate(x, *rotary(half))
    assert torch.equal(turned[..., :8], rotate(x[..., :8], *rotary(whole)))
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_rotation_keeps_the_length_and_the_dtype():
    cos, sin = rotary(SMALL)
    x = torch.randn(2, 3, 32, 8)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    assert torch.equal(rotate(x, cos, sin)[:, :, 0], x[:, :, 0])  # position 0 turns nothing


@pytest.mark.parametrize("dim", [128, 96, 6])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_those_of_transformers_in_every_bit_far_out(name, dim):
    scaling, theirs = SCALINGS[name]
    kind = {"rope_type": "default" if scaling.type == "none" else scaling.type, "rope_theta": 5e5}
    config = transformers.LlamaConfig(head_dim=dim, rope_parameters=kind | theirs, max_position_embeddings=16384)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(16384)[None])
    cfg = ModelConfig(context=16384, head_dim=dim, rope_theta=5e5, rope_scaling=scaling)
    for ours, of_transformers in zip(rotary(cfg), (cos, sin), strict=True):
        assert torch.equal(torch.cat([ours] * 2, -1), of_transformers[0])


def test_without_scaling_a_frequency_is_theta_to_the_minus_two_i_over_d():
    ours, factor = frequencies(ModelConfig(head_dim=10, rope_theta=300.0))
    assert factor == 1
    torch.testing.assert_close(ours.double(), 300.0 ** -(torch.arange(5, dtype=torch.float64) / 5))


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn with its own numbers"])
def test_scaling_slows_no_frequency_beyond_the_factor_and_quickens_none(name):
    """Some are changed, or the claims above would be of nothing."""
    scaling, _ = SCALINGS[name]
    plain, _ = frequencies(ModelConfig(head_dim=96))
    scaled, _ = frequencies(ModelConfig(head_dim=96, rope_scaling=scaling))
    slower = plain / scaled
    assert slower.min() >= 0.9999
    assert slower.max() == pytest.approx(scaling.factor)
