"""The model: what its layers cannot be."""

import pytest

from tests.moe.config.refusals import refusal

LATENT = {"model.latent": {"kv_rank": 8}}
IMPOSSIBLE = {  # settings that cannot go together, and the words that say so
    "tokens pass by no layer": (
        {"model.moe.depth": 0.5, "model.moe.depth_every": 5},
        "model.moe.depth=0.5 with model.moe.depth_every=5 concerns none of the MoE layers [0, 1, 2, 3]",
    ),
    "D % H": ({"model.d_model": 100, "model.n_heads": 3}, "model.d_model=100 is not divisible by model.n_heads=3"),
    "kv heads": ({"model.n_kv_heads": 3}, "model.n_kv_heads=3 must divide model.n_heads=4"),
    "more kv heads": ({"model.n_kv_heads": 8}, "model.n_kv_heads=8 must divide model.n_heads=4"),
    "odd rotary": ({"model.head_dim": 7}, "model.position=rope needs an even head dimension, and here it is 7"),
    "layers with no window": (
        {"model.window_layers": [1]},
        "model.window_layers=[1] means nothing to model.window=0: set the window too",
    ),
    "a window in no layer": (
        {"model.window": 8, "model.window_layers": [1, 4]},
        "model.window_layers=[1, 4] must be layers in rising order, from 0 to 3, each once",
    ),
    "windows out of order": (
        {"model.window": 8, "model.window_layers": [1, 0]},
        "model.window_layers=[1, 0] must be layers in rising order",
    ),
    "an odd number turns": (
        {"model.rope_fraction": 0.2, "model.head_dim": 16},
        "model.rope_fraction=0.2 of a head dimension of 16 are 3 channels: it must be an even number of at least 2",
    ),
    "none turns": ({"model.rope_fraction": 0.01, "model.head_dim": 16}, "model.rope_fraction=0.01 of a head dimension"),
    "a fraction of learned positions": (
        {"model.rope_fraction": 0.5, "model.position": "learned"},
        "model.rope_fraction=0.5 needs model.position=rope, not learned",
    ),
    "biases twice": (
        {"model.bias": True, "model.attn_bias": "qkv"},
        "model.attn_bias=qkv means nothing to model.bias=true, which gives all maps one",
    ),
    "scaled positions that are learned": (
        {"model.rope_scaling.type": "linear", "model.position": "learned"},
        "model.rope_scaling.type=linear needs model.position=rope, not learned",
    ),
    "a number that nobody reads": (
        {"model.rope_scaling.type": "linear", "model.rope_scaling.beta_fast": 8.0},
        "model.rope_scaling.beta_fast=8.0 means nothing to model.rope_scaling.type=linear, which reads factor",
    ),
    "scaled by nothing": (
        {"model.rope_scaling.factor": 2.0},
        "model.rope_scaling.factor=2.0 means nothing to model.rope_scaling.type=none, which reads no other setting",
    ),
    "stretched from nowhere": (
        {"model.rope_scaling.type": "yarn"},
        "model.rope_scaling.type=yarn needs model.rope_scaling.original_context",
    ),
    "turned around": (
        {"model.rope_scaling.type": "llama3", "model.rope_scaling.low_freq_factor": 4.0}
        | {"model.rope_scaling.original_context": 64},
        "model.rope_scaling.low_freq_factor=4.0 must be below model.rope_scaling.high_freq_factor=4.0",
    ),
    "latent kv heads": ({**LATENT, "model.n_kv_heads": 2}, "model.n_kv_heads=2 has no meaning with model.latent: "),
    "latent head": (
        {**LATENT, "model.head_dim": 8},
        "model.head_dim=8 has no meaning with model.latent: accepted is 0",
    ),
    "latent norm": ({**LATENT, "model.qk_norm": "head"}, "model.qk_norm=head has no meaning with model.latent: "),
    "latent bias": ({**LATENT, "model.bias": True}, "model.bias=True has no meaning with model.latent: "),
    "latent positions": ({**LATENT, "model.position": "learned"}, "model.position=learned has no meaning with "),
    "a scale of nothing": (
        {"model.latent": {"mscale": 1.0}},
        "model.latent.mscale=1.0 needs model.rope_scaling.type=yarn, and it is none",
    ),
    "odd latent": (
        {"model.latent": {"rope_dim": 7}},
        "model.position=rope needs an even model.latent.rope_dim, and here it is 7",
    ),
    "no layer (every)": ({"model.moe.every": 5}, "model.moe.every=5 with model.moe.first_dense=0 and"),
    "no layer (first_dense)": ({"model.moe.first_dense": 4}, "model.moe.first_dense=4 and model.moe.last_dense=0"),
    "no layer (last_dense)": (
        {"model.moe.last_dense": 4},
        "model.moe.last_dense=4 leaves no MoE layer among model.n_layers=4",
    ),
    "a layer short": (
        {"model.moe.k_by_layer": [1]},
        "model.moe.k_by_layer=[1] needs 4 numbers, one for each MoE layer",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_both_values(case):
    settings, words = IMPOSSIBLE[case]
    assert words in refusal(settings)
