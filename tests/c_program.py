"""run.c, compiled, and models with random weights that it is asked about: for every test of the two files."""

import re
import shutil

import pytest
import torch

from moe.config.model import ModelConfig
from moe.model.transformer import Transformer

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")


def sizes(moe=None, **changes):
    """A model like cpu-nano, smaller where that changes nothing."""
    shape = dict(vocab_size=257, context=96, n_layers=2, d_model=64, n_heads=4, d_ff=96, init_std=0.3, moe=moe)
    return ModelConfig(**shape | changes)


def random_model(cfg, router, document_end=None):
    """Random weights, norms, biases and selection biases too, so that each of them matters."""
    model = Transformer(cfg, router, document_end=document_end).initialize(1).eval()
    generator = torch.Generator().manual_seed(2)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias_E")]
    for values in [*(p.data for p in model.parameters() if p.dim() < 2), *biases]:
        values += 0.3 * torch.randn(values.shape, generator=generator)
    model.head.weight.data[-1] = 0  # the end of the text is never the most probable token
    return model


def ids_of(done):
    return [int(word) for word in done.stdout.split()]


def experts_shown(done):
    """Layer -> for every token in order its id and {expert: weight}, as --experts printed them."""
    shown = {}
    for line in done.stderr.decode().splitlines():
        token, layer, pairs = re.fullmatch(r"token \d+ id (\d+) layer (\d+):(.*)", line).groups()
        chosen = dict(pair.split("=") for pair in pairs.split())
        shown.setdefault(int(layer), []).append((int(token), {int(e): float(w) for e, w in chosen.items()}))
    return shown
