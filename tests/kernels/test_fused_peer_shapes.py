"""The kinds of layers that other kernels' tests are made of, written anew from what those tests describe, in sizes that
Triton's interpreter takes in seconds: the kernels are right on all of them in float32, and on all but the longest in 16
bits."""

import itertools
from typing import NamedTuple

import pytest
import torch

from kernels.form import NAMED, Form
from tests.kernels.small_experts import layer_arguments, run_kernels, wrong_results


class Layer(NamedTuple):
    t: int
    d: int
    f: int
    e: int
    k: int
    form: Form = Form("swiglu")
    load: str = "even"
    biased: bool = False
    by_columns: bool = False


LAYERS = {
    "vllm: one token": Layer(1, 128, 64, 8, 2),
    "vllm: an odd width and few tokens": Layer(33, 127, 32, 8, 2),
    "vllm: many choices of many experts": Layer(14, 48, 24, 48, 6),
    "vllm: experts of other ranks": Layer(33, 64, 32, 8, 2, load="half elsewhere"),
    "sglang: as many choices as experts but two": Layer(33, 64, 32, 8, 6),
    "sglang: gpt-oss with biases": Layer(24, 64, 32, 8, 4, NAMED["swiglu_clipped"], biased=True),
    "scattermoe: a batch of sequences": Layer(2 * 16, 48, 80, 8, 2, Form("gelu")),
    "scattermoe: one choice": Layer(40, 32, 64, 4, 1, Form("gelu")),
    "liger: all tokens to one expert": Layer(32, 64, 32, 4, 2, load="skewed"),
    "liger: experts without a token": Layer(32, 64, 32, 16, 2, load="unused"),
    "megablocks: dropless, ungated": Layer(64, 32, 64, 8, 4, Form("gelu_tanh")),
    "megablocks: more experts than tokens": Layer(12, 32, 16, 32, 1),
    "unsloth: llama 4, weights on the input": Layer(32, 64, 32, 16, 1, Form("swiglu", weigh_input=True)),
    "unsloth: qwen 3": Layer(12, 48, 24, 64, 8),
    "torch: groups of no rows, matrices by columns": Layer(16, 64, 32, 8, 2, load="unused", by_columns=True),
    "sonicmoe: gates in turns": Layer(64, 48, 32, 16, 4, Form("swiglu", interleaved=True)),
}


def _arguments(name, dtype):
    layer = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    expert = torch.rand(layer.t, layer.e, generator=generator).argsort(1)[:, : layer.k]
    if layer.load == "skewed":
        expert[:, 0] = torch.where((expert == 0).any(1), expert[:, 0], 0)
    if layer.load == "unused":
        expert = expert % 2 + 2 * (torch.arange(layer.k) % 2)  # of all experts, four at most
    if layer.load == "half elsewhere":
        expert = torch.where(expert < layer.e // 2, expert, -1)
    sizes = dict(n_experts=layer.e, d=layer.d, f=layer.f, form=layer.form, dtype=dtype)
    return layer_arguments(expert, biased=layer.biased, by_columns=layer.by_columns, **sizes)


# Those that the interpreter takes long for; their forms and loads are other layers' too.
LONG = ("vllm: many choices of many experts", "unsloth: qwen 3", "scattermoe: a batch of sequences")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(LAYERS, [torch.float32]), *((name, torch.float16) for name in LAYERS if name not in LONG)],
    ids=str,
)
def test_output_and_every_gradient_are_right(name, dtype):
    assert wrong_results(_arguments(name, dtype)) == []


@pytest.mark.parametrize("name", ["liger: experts without a token", "torch: groups of no rows, matrices by columns"])
def test_the_weights_of_experts_without_a_token_have_gradients_of_zero(name):
    arguments = _arguments(name, torch.float32)
    got = run_kernels(arguments)
    idle = sorted(set(range(len(arguments["w_up"]))) - set(arguments["expert"].flatten().tolist()))
    assert len(idle) >= 4
    assert not got["w_up"][idle].any()
    assert not got["w_down"][idle].any()
