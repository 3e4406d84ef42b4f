"""Latent attention against loops over positions and heads, and what its cache keeps."""

import cmath
import dataclasses
import math

import pytest
import torch

from moe.config.model import LatentConfig, MoEConfig, RopeScaling
from moe.model.attention import KVCache
from moe.model.latent import NORM_EPS, LatentAttention
from moe.model.rope import rotary

SHAPES = {"queries from the state": LatentConfig(5, 0, 3, 4, 7), "queries from a latent": LatentConfig(5, 6, 3, 4, 2)}


@pytest.fixture(params=SHAPES)
def cfg(request, model_config):
    """A tiny model's settings with each shape of latent attention in turn; no two of its sizes are equal."""
    return model_config(latent=SHAPES[request.param], head_dim=0, n_kv_heads=0)


def _attention(cfg):
    torch.manual_seed(0)
    module = LatentAttention(cfg).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.4)
    return module


def _rms(vector, weight):
    return vector / (vector.square().mean() + NORM_EPS).sqrt() * weight


def _turn(vector, position, theta):
    """Neighbouring channels as one complex number, turned."""
    pairs = vector.view(-1, 2)
    turned = [
        complex(*pair) * cmath.exp(1j * position * theta ** (-2 * i / len(vector)))
        for i, pair in enumerate(pairs.tolist())
    ]
    return torch.tensor([part for number in turned for part in (number.real, number.imag)], dtype=torch.float64)


def _naive(module, cfg, x):
    """One position and one query head at a time; keys and values are made from the latents, as the paper has them."""
    n, r, v_dim = cfg.latent.nope_dim, cfg.latent.rope_dim, cfg.latent.v_dim
    queries, keys, values = [], [], []
    for s, state in enumerate(x):
        query = _rms(module.q_down.weight @ state, module.q_norm.weight) if cfg.latent.q_rank else state
        queries.append(
            [torch.cat((q[:n], _turn(q[n:], s, cfg.rope_theta))) for q in (module.q.weight @ query).split(n + r)]
        )
        down = module.kv_down.weight @ state
        common = _turn(down[-r:], s, cfg.rope_theta)
        heads = (module.kv.weight @ _rms(down[:-r], module.kv_norm.weight)).split(n + v_dim)
        keys.append([torch.cat((head[:n], common)) for head in heads])
        values.append([head[n:] for head in heads])
    out = []
    for s in range(len(x)):
        heads = []
        for h in range(cfg.n_heads):
            weight = torch.stack([queries[s][h] @ keys[t][h] / math.sqrt(n + r) for t in range(s + 1)]).softmax(0)
            heads.append(sum(weight[t] * values[t][h] for t in range(s + 1)))
        out.append(module.o.weight @ torch.cat(heads))
    return torch.stack(out)


def test_latent_attention_is_the_formula_head_by_head(cfg):
    module, x = _attention(cfg), torch.randn(5, 12, dtype=torch.float64)
    rope = tuple(angles[:5].double() for angles in rotary(cfg))
    with torch.no_grad():
        # The angles are made in float32.
        torch.testing.assert_close(module(x[None], rope, 0)[0], _naive(module, cfg, x), rtol=1e-6, atol=1e-6)


def test_mscale_multiplies_the_scores_by_its_square_also_on_the_latents(cfg):
    """Which is what longer queries would do."""
    yarn = dataclasses.replace(cfg, rope_scaling=RopeScaling("yarn", 5.0, 8))
    scaled = dataclasses.replace(yarn, latent=dataclasses.replace(cfg.latent, mscale=0.7))
    plain, stretched, x = _attention(yarn), _attention(scaled), torch.randn(1, 5, 12, dtype=torch.float64)
    rope = tuple(angles[:5].double() for angles in rotary(yarn))
    with torch.no_grad():
        plain.q.weight *= (1 + 0.07 * math.log(5)) ** 2
        torch.testing.assert_close(stretched(x, rope, 0), plain(x, rope, 0))
        cache = KVCache(yarn, 1, torch.float64, x.device)
        for piece in (slice(0, 3), slice(3, 5)):
            y = stretched(x[:, piece], tuple(angles[piece] for angles in rope), 0, cache)
            torch.testing.assert_close(y, plain(x, rope, 0)[:, piece])
            cache.length += y.shape[1]


def test_the_cache_holds_latents_and_one_rope_key_and_no_heads(cfg):
    cache = KVCache(cfg, batch=3, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.store.numel() == cfg.n_layers * 3 * cfg.context * (cfg.latent.kv_rank + cfg.latent.rope_dim)


@pytest.mark.parametrize("document_end", [None, 3])
@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_logits_with_a_cache_are_those_without_one_however_the_tokens_come(make_model, cfg, depth, document_end):
    """In one piece, token by token, and in pieces of three; with separate documents and tokens that pass by too."""
    moe = MoEConfig(n_experts=5, k=3, d_expert=7, depth=depth)
    shape = dict(latent=cfg.latent, head_dim=0, n_kv_heads=0, n_layers=2, moe=moe)
    model = make_model(**shape).eval()
    model.document_end = document_end
    tokens_BS = torch.randint(0, 6, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(tokens_BS).logits_BSV
        for piece in (11, 1, 3):
            cache = KVCache(model.cfg, 2, torch.float64, tokens_BS.device)
            logits = [model(part, cache=cache).logits_BSV for part in tokens_BS.split(piece, dim=1)]
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)


def test_no_key_and_no_value_is_made_of_what_the_cache_holds(make_model, cfg):
    model, expanded = make_model(latent=cfg.latent, head_dim=0, n_kv_heads=0), []
    for block in model.blocks:
        block.attn.kv.register_forward_hook(lambda *_: expanded.append(1))
    cache = KVCache(model.cfg, 1, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        assert len(expanded) == len(model.blocks)
        model(torch.tensor([[4]]), cache=cache)
        model(torch.tensor([[5, 6]]), cache=cache)
    assert len(expanded) == len(model.blocks)


def test_bf16_autocast_trains_it_and_reads_its_cache(make_model, cfg):
    model = make_model(latent=cfg.latent, head_dim=0, n_kv_heads=0, dtype=torch.float32)
    tokens_BS = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_BS).logits_BSV.float().square().mean().backward()
        cache = KVCache(model.cfg, 1, torch.bfloat16, torch.device("cpu"))
        with torch.no_grad():
            expected = model(tokens_BS).logits_BSV
            read = torch.cat([model(part, cache=cache).logits_BSV for part in tokens_BS.split(5, dim=1)], 1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (read - expected).norm() / expected.norm() < 0.05
