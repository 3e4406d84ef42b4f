"""Text from a trained model: load a run, sample token by token with a KV cache, decode as it streams.

prompt ids -> logits of the last position -> `next_token_distribution` (temperature, top-k, top-p) -> one draw, again.
Weights are used in the precision they are stored in (float32), without autocast.
"""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config.model import moe_layers
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.attention import KVCache
from moe.model.layer import LayerRouting
from moe.model.transformer import Transformer
from moe.routing.contract import rows


class LayerChoice(NamedTuple):
    """The experts that one MoE layer chose for one token, and the weight each one's output gets, largest first."""

    layer: int  # from 0, among all layers
    experts: list[tuple[int, float]]


def check_causal(model: Transformer) -> None:
    """Raise `BadInput` for a model whose experts choose among all tokens at once: it would read what it is to say."""
    if not all(router.causal_in_eval for router in model.routers()):
        raise BadInput(
            f"router.name={model.router.name} chooses among all tokens at once and cannot choose for the next one: "
            "train with a causal form (router=expert-choice-threshold or router=expert-choice-predictor)."
        )


def next_token_distribution(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The probabilities that the next token is drawn with: (B, V) -> (B, V) float64, each row summing to 1.

    softmax(logits / temperature); temperature 0 is greedy, all mass on the largest logit. Of it the `top_k` most
    probable tokens stay (0: all), then of their renormalised mass the nucleus: the smallest set whose mass is at least
    `top_p`, never less than one token (1: all; Holtzman et al., 1904.09751). Of equals the lower id goes first.

    Raises `BadInput` for logits that are not finite."""
    if not torch.isfinite(logits_BV).all():
        raise BadInput("the model's logits have NaN or infinity among them: choose another checkpoint (which=...).")
    logits_BV = logits_BV.double()
    if temperature == 0:
        return F.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).double()
    # The largest becomes 0 first: however small the temperature, nothing overflows.
    prob_BV = torch.softmax((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature, dim=-1)
    sorted_BV, token_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0
    if top_p < 1:
        mass_BV = sorted_BV.cumsum(-1)
        before_BV = F.pad(mass_BV[:, :-1], (1, 0))
        sorted_BV = torch.where(before_BV < top_p * mass_BV[:, -1:], sorted_BV, 0.0)
    return torch.zeros_like(prob_BV).scatter(-1, token_BV, sorted_BV / sorted_BV.sum(-1, keepdim=True))


def generate(
    model: Transformer,
    prompt_ids: list[int],
    max_new: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eot: int,
    use_cache: bool = True,
    backend: str = "torch",
) -> Iterator[int]:
    """Yield at most `max_new` tokens that continue `prompt_ids`, drawn as in `sample`; fewer where the model ends the
    text with `eot`, which is not yielded. An empty prompt starts from `eot`, as a new document does in training."""
    prompts = [prompt_ids or [eot]]
    drawn = sample(
        model,
        prompts,
        max_new,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        use_cache=use_cache,
        backend=backend,
    )
    for token_B in drawn:
        token = int(token_B)
        if token == eot:
            return
        yield token


@torch.inference_mode()
def sample(
    model: Transformer,
    prompts: list[list[int]],
    max_new: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    backend: str = "torch",
) -> Iterator[Tensor]:
    """Yield `max_new` times the next token (B,), on the CPU, of B prompts of one length, at least one token each.

    The same seed gives the same tokens; no global random state is read or changed. Of a prompt longer than the context
    its end is read. When the context is full its last half is kept and read anew from position 0, so what was said
    before it is forgotten, and each token is predicted from at least half a context. `use_cache=False` computes every
    position again for every token: the same tokens, slowly."""
    context, device = model.cfg.context, model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: one seed means the same draws on every device
    window_BS = torch.tensor(prompts, device=device)[:, -context:]
    cache = None
    if use_cache:
        longest = dataclasses.replace(model.cfg, context=min(context, window_BS.shape[1] + max_new))
        cache = KVCache(longest, len(prompts), model.embed.weight.dtype, device)
    for _ in range(max_new):
        # A full context keeps its last half, whose positions begin anew: what the cache holds is of no use.
        if window_BS.shape[1] > context:
            window_BS = window_BS[:, -max(1, context // 2) :]
            if cache is not None:
                cache.length = 0

        # What the model has not read yet, the distribution after it, and one draw.
        unread_BS = window_BS[:, cache.length :] if cache is not None else window_BS
        logits_BSV = model(unread_BS, backend=backend, cache=cache).logits_BSV
        prob_BV = next_token_distribution(logits_BSV[:, -1], temperature, top_k, top_p).cpu()
        token_B1 = torch.multinomial(prob_BV, 1, generator=generator)
        yield token_B1[:, 0]
        window_BS = torch.cat([window_BS, token_B1.to(device)], dim=1)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as they come, in whole characters: the bytes of one that is not complete yet are held back, and
    dropped if the ids end inside it. Bytes that no UTF-8 text has become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        text = decoder.decode(token_bytes(tokenizer, token))
        if text:
            yield text


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Bytes of one token; none for an id that only the model has, its vocabulary being larger than the tokenizer's."""
    return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""


@torch.inference_mode()
def next_tokens(
    model: Transformer, ids: list[int], n: int, *, backend: str = "torch"
) -> tuple[list[tuple[int, float]], list[LayerChoice]]:
    """The `n` most probable tokens after `ids` (at least one) with their probabilities, most probable first, and the
    experts every MoE layer chose for the last of `ids`. Of `ids` longer than the context the end is read."""
    tokens_BS = torch.tensor([ids[-model.cfg.context :]], device=model.embed.weight.device)
    logits_BSV, routing = model(tokens_BS, backend=backend)
    prob_V = next_token_distribution(logits_BSV[:, -1], temperature=1.0, top_k=0, top_p=1.0)[0]
    top = prob_V.topk(min(n, len(prob_V)))
    layers = moe_layers(model.cfg)
    choices = [
        LayerChoice(layer, _experts(layer_routing, tokens_BS.shape[1] - 1))
        for layer, layer_routing in zip(layers, routing, strict=True)
    ]
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True)), choices


def _experts(routing: LayerRouting, token: int) -> list[tuple[int, float]]:
    """(expert, weight) of one token's routed rows, dropped ones left out, the largest weight first."""
    token_N, expert_N, weight_N = rows(routing.token_N, routing.expert, routing.weight)
    pairs = zip(expert_N[token_N == token].tolist(), weight_N[token_N == token].tolist(), strict=True)
    return sorted(((expert, weight) for expert, weight in pairs if expert >= 0), key=lambda pair: -pair[1])
