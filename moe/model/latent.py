"""Multi-head latent attention (MLA): keys and values of all heads come from one short vector per token.

Letters beyond the glossary: d channels of a head (r of them turned by positions, n not) · R length of the latent.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from moe.config.model import ModelConfig, head_dim
from moe.model.attention import KVCache, in_own_dtype, visible
from moe.model.rope import rotate

NORM_EPS = 1e-6  # of the latents' norms, whatever model.norm_eps is (as DeepSeek's models have it)


def rotate_pairs(x_BHSr: Tensor, cos_Sr: Tensor, sin_Sr: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i + 1), DeepSeek's layout: (B, H, S, r) -> (B, H, S, r), first the pairs' first
    channels, then their second ones. A dot product of two such vectors does not depend on the order."""
    return rotate(rearrange(x_BHSr, "... (r two) -> ... (two r)", two=2), cos_Sr, sin_Sr)


class LatentAttention(nn.Module):
    """x (B, S, D) -> (B, S, D), multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    A token's state becomes a latent c (R) and a rope key (r); key and value of head h are [W_k,h c, rope key] and
    W_v,h c, its query is [n, r] channels of its own, made from a latent too where `q_rank` says so. The cache holds c
    and the rope key, R + r numbers for a token and layer, whatever the number of heads. Who reads them back does not
    expand them: with W_k,h taken to the query's side and W_v,h to the output's, every head attends to the latents
    themselves (the paper's absorption), which is the same function.

    keys_BS and mask: as of `Attention`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.latent is not None, "model.latent is null: that is grouped-query attention"
        self.latent, self.n_heads = cfg.latent, cfg.n_heads
        stretch = 1 + 0.1 * cfg.latent.mscale * math.log(cfg.rope_scaling.factor)  # 1 without YaRN
        self.scale = head_dim(cfg) ** -0.5 * stretch**2  # of scores
        q_rank, kv_rank = cfg.latent.q_rank, cfg.latent.kv_rank
        self.q_down = nn.Linear(cfg.d_model, q_rank, bias=False) if q_rank else nn.Identity()
        self.q_norm = nn.RMSNorm(q_rank, eps=NORM_EPS) if q_rank else nn.Identity()
        self.q = nn.Linear(q_rank or cfg.d_model, cfg.n_heads * head_dim(cfg), bias=False)
        self.kv_down = nn.Linear(cfg.d_model, kv_rank + cfg.latent.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, eps=NORM_EPS)
        self.kv = nn.Linear(kv_rank, cfg.n_heads * (cfg.latent.nope_dim + cfg.latent.v_dim), bias=False)
        self.o = nn.Linear(cfg.n_heads * cfg.latent.v_dim, cfg.d_model, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        layer: int,
        cache: KVCache | None = None,
        keys_BS: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        assert rope is not None, "latent attention has rotary positions"
        shape = self.latent
        # Queries, and of keys and values what they are made from.
        q_BSd = self.q_down(x_BSD)
        if shape.q_rank:
            q_BSd = in_own_dtype(self.q_norm, q_BSd)
        q_BHSd = rearrange(self.q(q_BSd), "b s (h d) -> b h s d", h=self.n_heads)
        q_nope, q_rope = q_BHSd.split([shape.nope_dim, shape.rope_dim], -1)
        latent_BSR, key_BSr = self.kv_down(x_BSD).split([shape.kv_rank, shape.rope_dim], -1)
        latent_BSR = in_own_dtype(self.kv_norm, latent_BSR)
        q_rope, key_BHSr = rotate_pairs(q_rope, *rope), rotate_pairs(key_BSr[:, None], *rope)
        # The latents so far, and which of them a query may attend to.
        past, kept_BHSR = 0, torch.cat((latent_BSR[:, None], key_BHSr), -1)
        if cache is not None:
            past, kept_BHSR = cache.length, cache.extend(layer, kept_BHSR)
            keys_BS = cache.attended(layer, keys_BS)
        mask = visible(q_BHSd, past, keys_BS, mask)
        attend = self.absorbed if past else self.expanded
        return self.o(rearrange(attend(q_nope, q_rope, kept_BHSR, mask), "b h s d -> b s (h d)"))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, kept_BHSR: Tensor, mask: Tensor | None) -> Tensor:
        """Every head with keys and values of its own, made from the latents: (B, H, S, v_dim)."""
        shape = self.latent
        latent_BHSR, key_BHSr = kept_BHSR.split([shape.kv_rank, shape.rope_dim], -1)
        kv_BHSd = rearrange(self.kv(latent_BHSR[:, 0]), "b s (h d) -> b h s d", h=self.n_heads)
        k_nope, v = kv_BHSd.split([shape.nope_dim, shape.v_dim], -1)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, key_BHSr.expand(-1, self.n_heads, -1, -1)), -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, kept_BHSR: Tensor, mask: Tensor | None) -> Tensor:
        """The same from the latents as they are: heads are so many queries to one common key and value."""
        shape, (b, h, s, _) = self.latent, q_nope.shape
        w_HdR = self.kv.weight.view(h, shape.nope_dim + shape.v_dim, shape.kv_rank)
        w_k_HdR, w_v_HdR = w_HdR.split([shape.nope_dim, shape.v_dim], 1)
        q = torch.cat((einsum(q_nope, w_k_HdR, "b h s d, h d r -> b h s r"), q_rope), -1).flatten(1, 2)[:, None]
        if mask is not None:
            mask = mask.expand(b, h, s, -1).flatten(1, 2)[:, None]
        values = kept_BHSR[..., : shape.kv_rank]
        mixed = F.scaled_dot_product_attention(q, kept_BHSR, values, attn_mask=mask, scale=self.scale)
        return einsum(mixed.view(b, h, s, -1), w_v_HdR, "b h s r, h d r -> b h s d")
