"""Attention against loops over positions and heads, and the cache."""

import cmath
import math

import pytest
import torch

from moe.model.attention import Attention, KVCache, within_documents, within_window
from moe.model.rope import rotary


def _attention(cfg, seed=0):
    torch.manual_seed(seed)
    module = Attention(cfg).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.4)
    return module


def _rms(vector, weight, eps):
    return vector / (vector.square().mean() + eps).sqrt() * weight


def _naive(module, cfg, x, rope):
    """One position and one query head at a time."""
    d, group = module.d_head, cfg.n_heads // (cfg.n_kv_heads or cfg.n_heads)
    q, k, v = ([linear(each) for each in x] for linear in (module.q, module.k, module.v))
    if cfg.qk_norm == "full":
        q = [_rms(each, module.q_norm.weight, cfg.norm_eps) for each in q]
        k = [_rms(each, module.k_norm.weight, cfg.norm_eps) for each in k]

    def head(vectors, h, norm, turn=True):
        rows = []
        for s, vector in enumerate(vectors):
            row = vector[h * d : (h + 1) * d]
            if cfg.qk_norm == "head" and norm is not None:
                row = _rms(row, norm.weight, cfg.norm_eps)
            if rope and turn:
                pairs = [
                    complex(row[i], row[i + d // 2]) * cmath.exp(1j * s * cfg.rope_theta ** (-2 * i / d))
                    for i in range(d // 2)
                ]
                row = torch.tensor([p.real for p in pairs] + [p.imag for p in pairs], dtype=torch.float64)
            rows.append(row)
        return rows

    out = []
    for s in range(len(x)):
        heads = []
        for h in range(cfg.n_heads):
            query = head(q, h, module.q_norm)[s]
            first = max(0, s + 1 - cfg.window) if cfg.window else 0
            keys = head(k, h // group, module.k_norm)[first : s + 1]
            values = head(v, h // group, None, turn=False)[first : s + 1]
            score = torch.stack([query @ key * (cfg.attn_scale or 1 / math.sqrt(d)) for key in keys])
            sink = 0 if module.sinks is None else module.sinks[h].exp()
            weight = score.exp() / (score.exp().sum() + sink)
            heads.append(sum(w * value for w, value in zip(weight, values, strict=True)))
        out.append(module.o(torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize("n_kv_heads", [0, 1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize(("window", "sinks"), [(0, False), (1, False), (3, False), (0, True), (1, True)])
def test_attention_is_the_formula_head_by_head(model_config, n_kv_heads, qk_norm, position, window, sinks):
    cfg = model_config(n_kv_heads=n_kv_heads, qk_norm=qk_norm, position=position, bias=True, window=window, sinks=sinks)
    cfg.attn_scale = 0.9 * (window == 1)
    module, x = _attention(cfg), torch.randn(5, 12, dtype=torch.float64)
    rope = tuple(each[:5].double() for each in rotary(cfg)) if position == "rope" else None
    with torch.no_grad():
        # The angles are made in float32.
        mask = within_window(0, 5, window, x.device, None)
        y = module(x[None], rope, 0, mask=mask)[0]
        torch.testing.assert_close(y, _naive(module, cfg, x, rope), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_kv_heads", [0, 1, 2])
def test_the_cache_holds_the_keys_of_the_kv_heads_only(model_config, n_kv_heads):
    cfg = model_config(n_kv_heads=n_kv_heads)
    cache = KVCache(cfg, batch=3, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.store.numel() == 2 * cfg.n_layers * 3 * cfg.context * (n_kv_heads or cfg.n_heads) * cfg.head_dim


def test_a_layer_writes_its_own_part_of_the_cache_and_gets_back_its_own_dtype(model_config):
    cache = KVCache(model_config(), batch=1, dtype=torch.float32, device=torch.device("cpu"))
    first, second = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 1, 8)
    cache.extend(1, first)
    cache.length = 3
    torch.testing.assert_close(cache.extend(1, second.bfloat16()), torch.cat((first, second), 2).bfloat16())
    assert (cache.store[0] == 0).all()


@pytest.mark.parametrize(
    ("row", "documents"),
    [
        ([1, 2, 3, 4], [[0, 1, 2, 3]]),
        ([1, 9, 3, 4], [[0, 1], [2, 3]]),
        ([9, 2, 9, 9], [[0], [1, 2], [3]]),
        ([1, 2, 3, 9], [[0, 1, 2, 3]]),
        ([9], [[0]]),
    ],
)
def test_a_token_may_attend_to_its_document_up_to_itself_and_the_end_token_belongs_to_the_one_it_ends(row, documents):
    place_BS, attends_B1SS = within_documents(torch.tensor([row, row]), document_end=9)
    assert place_BS.tolist() == [[i for document in documents for i in range(len(document))]] * 2
    allowed = [[key for key in document if key <= query] for document in documents for query in document]
    assert [row_S.nonzero().flatten().tolist() for row_S in attends_B1SS[1, 0]] == allowed


def test_a_window_narrows_what_a_mask_allows_and_is_none_where_nothing_is_as_far_away():
    device = torch.device("cpu")
    mask = torch.rand(2, 1, 3, 8) > 0.3
    expected = [[s - 4 < key <= s for key in range(8)] for s in (5, 6, 7)]
    assert within_window(5, 8, 4, device, None)[0, 0].tolist() == expected
    assert torch.equal(within_window(5, 8, 4, device, mask), mask & torch.tensor(expected))
    for window in (0, 8, 9):
        assert within_window(5, 8, window, device, None) is None
        assert within_window(5, 8, window, device, mask) is mask
