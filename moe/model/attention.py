"""Causal grouped-query attention, documents within a window and the KV cache.

Letters beyond the glossary: d channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.config.model import ModelConfig, attn_bias, head_dim
from moe.model.rope import rotate


class KVCache:
    """What attention keeps of every layer for the positions seen so far; `length` of them are filled.

    Keys and values of every head: 2·L·B·context·n_kv_heads·head_dim elements. With latent attention what all heads'
    keys and values are made from, and the one rope key: L·B·context·(kv_rank + rope_dim). Preallocated for `context`
    positions: a step writes in place."""

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, channels = cfg.n_kv_heads or cfg.n_heads, 2 * head_dim(cfg)
        if cfg.latent is not None:
            heads, channels = 1, cfg.latent.kv_rank + cfg.latent.rope_dim
        self.store = torch.zeros((cfg.n_layers, batch, heads, cfg.context, channels), dtype=dtype, device=device)
        self.keys = torch.ones((cfg.n_layers, batch, cfg.context), dtype=torch.bool, device=device)  # see `Attention`
        self.tokens = torch.zeros((batch, cfg.context), dtype=torch.int64, device=device)  # see `read`
        self.length = 0

    def read(self, tokens_BS: Tensor) -> Tensor:
        """All tokens so far, these (B, S) behind them: where documents are separate, they say who attends to whom."""
        end = self.length + tokens_BS.shape[1]
        self.tokens[:, self.length : end] = tokens_BS
        return self.tokens[:, :end]

    def extend(self, layer: int, kept_BHSd: Tensor) -> Tensor:
        """Write what layer `layer` keeps of these positions, (B, heads, S, channels), behind what is there; returns all
        so far. `length` is advanced by the model once every layer has written."""
        store = self.store[layer, :, :, : self.length + kept_BHSd.shape[2]]
        store[:, :, self.length :] = kept_BHSd
        return store.to(kept_BHSd.dtype)

    def attended(self, layer: int, keys_BS: Tensor | None) -> Tensor | None:
        """Which positions so far are attended to in layer `layer`, where `keys_BS` (B, S) says it of these; see
        `Attention`."""
        if keys_BS is None:
            return None
        end = self.length + keys_BS.shape[1]
        self.keys[layer, :, self.length : end] = keys_BS
        return self.keys[layer, :, :end]


def within_documents(tokens_BS: Tensor, document_end: int) -> tuple[Tensor, Tensor]:
    """Where tokens are in their document, from 0, and which tokens each may attend to, those of its document up to
    itself: (B, S) -> (B, S) int64 and (B, 1, S, S) bool, of queries and keys.

    A document ends with the token `document_end`, which is its own; the window's first one begins with the window."""
    index_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    first_BS = F.pad(tokens_BS[:, :-1] == document_end, (1, 0), value=True)
    start_BS = torch.where(first_BS, index_S, 0).cummax(-1).values
    attends_BSS = (start_BS[:, :, None] <= index_S) & (index_S <= index_S[:, None])
    return index_S - start_BS, attends_BSS[:, None]


def within_window(past: int, end: int, window: int, device: torch.device, mask: Tensor | None) -> Tensor | None:
    """Which keys the queries at positions past, past + 1, … end − 1 may attend to: the last `window` up to their own,
    and none that `mask` forbids. (1 or B, 1, S, end) bool; `mask` itself where none is further away than that, and for
    window 0, which is none."""
    if not window or end <= window:
        return mask
    distance = torch.arange(past, end, device=device)[:, None] - torch.arange(end, device=device)
    near = ((distance >= 0) & (distance < window))[None, None]
    return near if mask is None else near & mask


def visible(q_BHSd: Tensor, past: int, keys_BS: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which keys a query may attend to, for queries behind `past` positions: (B or 1, 1, S, all keys) bool, or None
    where there is no need to say: all up to its own position of S without a past, or all for a last one alone.

    keys_BS, mask: as of `Attention`, of all keys."""
    s = q_BHSd.shape[2]
    if mask is None and (keys_BS is not None or (past and s > 1)):  # causal, shifted by the past
        mask = torch.ones(s, past + s, dtype=torch.bool, device=q_BHSd.device).tril(past)[None, None]
    return mask if mask is None or keys_BS is None else mask & keys_BS[:, None, None]


def in_own_dtype(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm` computed in its weight's dtype: under autocast a projection is bf16 and the fused norm wants one dtype."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)  # type: ignore[arg-type]


def with_sink(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, product_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One more key in front that every query may attend to, with the value 0, whose product with a head's queries is
    `product_H`: by one more channel of queries and keys, which is 0 in all other keys."""
    b, h, s, _ = q.shape
    q = torch.cat((q, product_H.view(1, h, 1, 1).expand(b, h, s, 1)), -1)
    k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 0, 1, 0))
    k[:, :, 0, -1] = 1
    return q, k, v, None if mask is None else F.pad(mask, (1, 0), value=True)


class Attention(nn.Module):
    """x (B, S, D) -> (B, S, D). Optional RMS norm of queries and keys: per head (Qwen3) or over all heads (OLMoE).

    sinks: the softmax of a head has one more score, learned, whose key is no token and whose value is 0 (gpt-oss,
    2508.10925): its weights may sum to less than 1.
    keys_BS: which of these positions are attended to, if not all. The outputs of the others mean nothing.
    mask: which keys a query may attend to, (B, 1, S, all keys) bool; without it all up to its own position."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.d_head = cfg, head_dim(cfg)
        d_q, d_kv = cfg.n_heads * self.d_head, (cfg.n_kv_heads or cfg.n_heads) * self.d_head
        biases = attn_bias(cfg)
        self.q = nn.Linear(cfg.d_model, d_q, bias=biases != "none")
        self.k = nn.Linear(cfg.d_model, d_kv, bias=biases != "none")
        self.v = nn.Linear(cfg.d_model, d_kv, bias=biases != "none")
        self.o = nn.Linear(d_q, cfg.d_model, bias=biases == "all")
        self.sinks = nn.Parameter(torch.empty(cfg.n_heads)) if cfg.sinks else None
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if cfg.qk_norm != "none":
            per_head = cfg.qk_norm == "head"
            self.q_norm = nn.RMSNorm(self.d_head if per_head else d_q, eps=cfg.norm_eps)
            self.k_norm = nn.RMSNorm(self.d_head if per_head else d_kv, eps=cfg.norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        layer: int,
        cache: KVCache | None = None,
        keys_BS: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if self.cfg.qk_norm == "full":
            q, k = in_own_dtype(self.q_norm, q), in_own_dtype(self.k_norm, k)
        q, k, v = (rearrange(states, "b s (h d) -> b h s d", d=self.d_head) for states in (q, k, v))
        if self.cfg.qk_norm == "head":
            q, k = in_own_dtype(self.q_norm, q), in_own_dtype(self.k_norm, k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        past = 0
        if cache is not None:
            past, keys_BS = cache.length, cache.attended(layer, keys_BS)
            k, v = cache.extend(layer, torch.cat((k, v), -1)).chunk(2, -1)
        if mask is not None:  # torch's memory-efficient kernel takes a mask, but wants a key head for every head
            k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        mask = visible(q, past, keys_BS, mask)
        causal, scale = mask is None and not past, self.cfg.attn_scale or None
        if self.sinks is not None:
            scale = scale or self.d_head**-0.5
            if causal:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            q, k, v, mask = with_sink(q, k, v, mask, self.sinks.to(q.dtype) / scale)
            causal = False
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.o(rearrange(y, "b h s d -> b s (h d)"))
