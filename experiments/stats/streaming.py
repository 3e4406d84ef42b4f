"""What a trace that is made layer by layer will take, before any weight is there: from settings alone.

Each number is arithmetic on sizes. Memory is what tensors take at their peak; the libraries' own comes on top, and
stands in the first row of `bench suite=tracing`.
"""

from typing import NamedTuple

import torch

from moe.analysis.windows import AT_ONCE, LONGEST
from moe.config.model import ModelConfig, layer_moe, moe_layers
from moe.config.router import RouterConfig
from moe.model.cost import flops, size
from moe.model.transformer import Transformer

FULL, HALF = 4, 2  # bytes of a number in memory, and in a folder


class Streamed(NamedTuple):
    """The answer, in bytes where it is memory."""

    folder: int  # of the weights in bf16, each of which is read once
    block: int  # the largest one
    memory: int  # at the peak
    states: int  # in files, between layers
    routes: int  # in files, until the trace is written
    flops: int


def streamed(cfg: ModelConfig, router: RouterConfig, tokens: int) -> Streamed:
    """The cost of so many tokens in windows of `LONGEST`, `AT_ONCE` tokens at a time."""
    with torch.device("meta"):
        model = Transformer(cfg, router)
    context = min(cfg.context, LONGEST)
    t, d, v = max(AT_ONCE, context), cfg.d_model, cfg.vocab_size
    # A block with what it computes of a batch: states twice, and of every routed row the token, the experts' up
    # projection, what is left of it after the activation, and the output. Or, while it is read, a tensor as it is read.
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    moes = [layer_moe(cfg, layer) for layer in moe_layers(cfg)]
    rows = max(moe.k * (2 * d + 3 * moe.d_expert) for moe in moes)
    largest = max(moe.d_expert * d for moe in moes)
    block = FULL * max(blocks)
    computing = block + max(FULL * t * (2 * d + rows), HALF * largest)
    # Embeddings and head, as they are read; and the logits of a batch, with their logarithms.
    reading = (FULL + HALF) * v * d
    ending = FULL * (v * d + 2 * t * v)
    return Streamed(
        folder=HALF * size(cfg, router).total,
        block=block,
        memory=max(computing, reading, ending),
        states=FULL * tokens * d,
        routes=tokens * sum(moe.k * (4 + HALF) + 2 * HALF for moe in moes),
        flops=flops(cfg, router, context).evaluation * tokens,
    )
