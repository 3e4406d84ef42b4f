"""The layers and routers that `kernels.aot` compiles, launched as a run launches them, on tensors without memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import fused, gate, quantized, tuning
from kernels.form import NAMED, Form
from kernels.fp8 import blocks
from kernels.quantized import FORMATS


class Case(NamedTuple):
    """Sizes that a layer is compiled for."""

    shape: str
    type: str  # one of tuning.TYPES; 16bit is bfloat16
    tokens: int
    d: int
    f: int
    experts: int
    k: int
    form: Form = Form("swiglu")
    ragged: bool = False  # rows are listed with their tokens
    biased: bool = False
    by_columns: bool = False  # how matrices are stored
    stored: str = ""  # in which of quantized.FORMATS, for inference

    @property
    def width(self) -> int:
        """Columns of up's product."""
        return self.form.width(self.f)

    @property
    def even(self) -> bool:
        """As tuning.is_even."""
        return tuning.is_even(new(self.experts, self.width, self.d))

    @property
    def load(self) -> str:
        """As tuning.tile calls it."""
        return "few" if self.tokens * self.k < tuning.FEW * self.experts or not self.even else "many"


EVEN = Case("even", "16bit", 16384, 2048, 1024, 64, 8)  # OLMoE's layer
QUANTIZED = Case("", "16bit", 64, 2880, 2880, 32, 4, NAMED["swiglu_clipped"], biased=True)  # gpt-oss', a light load
CASES = (
    *(EVEN._replace(type=kind, tokens=tokens) for kind in tuning.TYPES for tokens in (64, 16384)),
    EVEN._replace(shape="tanh", form=Form("gelu_tanh")),
    *(EVEN._replace(shape="gelu", type=kind, form=Form("gelu")) for kind in tuning.TYPES),
    EVEN._replace(shape="clamped", f=1408),  # no multiple of the widest tile
    Case("masked", "16bit", 1000, 96, 80, 5, 3),  # multiples of 16, and of no tile
    Case("odd", "16bit", 1000, 100, 52, 5, 3, Form("gelu")),  # rows that no copy engine takes
    EVEN._replace(shape="ragged", ragged=True),
    EVEN._replace(shape="gpt-oss", form=NAMED["swiglu_clipped"], biased=True),
    EVEN._replace(shape="columns", by_columns=True),
    EVEN._replace(shape="weighed", form=Form("swiglu", weigh_input=True)),
    *(EVEN._replace(shape="fp8", form=Form("swiglu", fp8="all"), tokens=tokens) for tokens in (64, 16384)),
    Case("fp8-odd", "16bit", 1000, 100, 52, 5, 3, Form("gelu", fp8="all")),
    *(QUANTIZED._replace(shape=stored, stored=stored) for stored in FORMATS),
    *(
        Case(f"{stored}-odd", kind, 64, 96, 160, 5, 3, stored=stored)
        for stored in FORMATS
        for kind in ("16bit", "fp32")
    ),
    QUANTIZED._replace(shape="fp8-both", stored="fp8", form=QUANTIZED.form._replace(fp8="all")),
)


def layer(case: Case) -> None:
    """Launch every kernel of an MoE layer's experts, forward and backward; of stored ones, forward alone."""
    dtype = torch.bfloat16 if case.type == "16bit" else torch.float32
    tf32, t, k, d, f, e = case.type == "tf32", case.tokens, case.k, case.d, case.f, case.experts
    x_TD, rows = new(t, d, dtype=dtype), (t * k,) if case.ragged else (t, k)
    expert, weight = new(*rows, dtype=torch.int64), new(*rows)
    token_N = new(t * k, dtype=torch.int64) if case.ragged else None
    biases = [new(e, n, dtype=dtype) if case.biased else None for n in (case.width, d)]
    if case.stored:
        stored = (*_stored(case.stored, e, case.width, d), *_stored(case.stored, e, d, f))
        quantized._on_kernels._init_fn(x_TD, *stored, token_N, expert, weight, *biases, *case.form, tf32)
        return
    start_T1 = new(t + 1, dtype=torch.int64) if case.ragged else None
    routing = fused._plan._init_fn(expert, token_N, e, dtype, tf32, case.even)
    stack = lambda m, n: new(e, n, m, dtype=dtype).mT if case.by_columns else new(e, m, n, dtype=dtype)
    weights = (stack(case.width, d), stack(d, f), weight, *biases)
    out_TD, z = fused._forward._init_fn(x_TD, *weights, start_T1, *routing, *case.form, tf32, True)
    wanted = [True] * 4 + [case.biased] * 2
    fused._backward._init_fn(out_TD, x_TD, z, *weights, start_T1, *routing, *case.form, tf32, wanted)


def _stored(name: str, e: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values and scales of matrices (E, N, M) in this format, none of which is computed."""
    match name:
        case "int8":
            return new(e, n, m, dtype=torch.int8), new(e, n)
        case "mxfp4":
            return new(e, n, m // 32, 16, dtype=torch.uint8), new(e, n, m // 32, dtype=torch.uint8)
    assert name == "fp8"
    return new(e, n, m, dtype=torch.float8_e4m3fn), new(e, *blocks(torch.Size((n, m))))


def route(
    t: int, e: int, k: int, score: str, groups: int = 1, k_groups: int = 1, dtype: torch.dtype = torch.float32
) -> None:
    """Launch the gate, forward and backward, and the plan of what it chose; logits in `dtype`."""
    logits_TE, bias_E = new(t, e, dtype=dtype), None if score == "softmax" else new(e)
    expert, *outputs = gate._forward._init_fn(logits_TE, k, score, bias_E, True, 1.0, groups, k_groups, 2)
    gate._backward._init_fn(logits_TE, expert, *outputs, score, True, 1.0)
    fused._plan._init_fn(expert, None, e, torch.bfloat16, False)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
