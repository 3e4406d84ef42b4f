"""Other people's experts on our tensors, for the benchmark of a layer.

A peer is a function (x (T, D), w_up, w_down, expert (T, K) int64, weight (T, K)) -> y (T, D), swiglu, with the weights
in its own layout; `layout` makes that once, outside the timing, from ours: (E, 2F, D) with the gate's rows first, and
(E, D, F). Nothing of a peer is imported before it is called. Written against the sources named at each adapter.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.suites.cases import Wrong
from experiments.suites.timing import relative_error
from kernels import grouped, reference
from kernels.form import Form
from moe.routing.contract import rows

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Layout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Relative error above which an output or a gradient is wrong, not rounded: bf16 has 8 bits, tf32 and fp16 have 11.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3, torch.float64: 1e-9}


class Peer(NamedTuple):
    """One implementation of the experts."""

    run: Experts
    packages: tuple[str, ...]  # that it imports
    layout: Layout = lambda w_up, w_down: (w_up, w_down)
    tolerance: float = 0.0  # relative error that it may have, where it rounds more than the type of its operands


def triton_experts(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Our kernels, as dispatch=triton calls them."""
    from kernels import fused  # here, because Triton is not everywhere

    return fused.experts(x, w_up, w_down, None, expert, weight, "swiglu")[0]


def triton_fp8(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """The same with products in fp8, weights rounded at every call: model.moe.precision=fp8."""
    from kernels import fused

    return fused.experts(x, w_up, w_down, None, expert, weight, Form("swiglu", fp8="all"))[0]


def torch_experts(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """One matmul per expert, as dispatch=torch calls them."""
    return grouped.experts(x, w_up, w_down, *rows(None, expert, weight), "swiglu")


def grouped_mm(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """What one writes with torch's grouped matmul: sort, gather, multiply, weigh, put back. No wait for the device."""
    n_tokens, k = expert.shape
    multiply: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    sorted_N, order_N = expert.flatten().sort(stable=True)
    slot_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x.device))
    ends_E = torch.searchsorted(sorted_N, torch.arange(len(w_up), device=x.device), right=True).int()
    gate, up = multiply(x[order_N // k], w_up.mT, offs=ends_E).chunk(2, dim=-1)
    y_ND = multiply(F.silu(gate) * up, w_down.mT, offs=ends_E)
    return torch.bmm(weight.to(x.dtype)[:, None], y_ND[slot_N].view(n_tokens, k, -1)).squeeze(1)


def liger(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """linkedin/Liger-Kernel, src/liger_kernel/ops/fused_moe.py: (x, gate_up_proj (E, 2F, D), down_proj (E, D, F),
    top_k_index (T, K) int32, top_k_weights (T, K)). It tunes itself on its first call and waits for the device in
    each."""
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w_up, w_down, expert.int(), weight.to(x.dtype))


def scattermoe(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """shawntan/scattermoe, scattermoe/mlp.py (GLUMLP) over scattermoe/parallel_experts.py: parallel_linear(inputs,
    weights (E, in, out), k, sorted ids, sorted rows, ends, gates=, grouped_in=, grouped_out=)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    plan = flatten_sort_count(expert, num_experts=len(w_up))
    z = parallel_linear(x, w_up.permute(0, 2, 1), expert.shape[1], *plan, grouped_out=True)
    gate, up = z.chunk(2, dim=-1)
    h = F.silu(gate) * up
    return parallel_linear(h, w_down.permute(0, 2, 1), 1, *plan, grouped_in=True, gates=weight.to(x.dtype))


def megablocks(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """databricks/megablocks, megablocks/layers/dmoe.py (grouped_permute_and_compute) over layers/glu.py
    (memory_optimized_grouped_glu(x, w1, v1, w2, rows per expert on the host, activation), each (E, F, D))."""
    from megablocks import ops
    from megablocks.layers.glu import memory_optimized_grouped_glu

    n_experts, k = w_up.shape[1], expert.shape[1]
    with torch.no_grad():
        flat = expert.flatten().int()
        ids, order = ops.sort(flat, max(1, (n_experts - 1).bit_length()))
        count = ops.histogram(flat, n_experts)
        ends = ops.inclusive_cumsum(count, 0).view(-1)
    x_ND = ops.gather(x, order, ids, ends, k)
    y_ND = memory_optimized_grouped_glu(x_ND, w_up[0], w_up[1], w_down, count.cpu().long(), F.silu)
    return ops.scatter(y_ND, order, ids, weight.to(x.dtype).flatten(), ends, k)


def megablocks_layout(w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """(E, 2F, D) -> (2, E, F, D), gate and up; (E, D, F) -> (E, F, D)."""
    return torch.stack(w_up.chunk(2, dim=1)), w_down.mT.contiguous()


def sonicmoe(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Dao-AILab/sonic-moe, sonicmoe/functional/__init__.py: moe_general_routing_inputs(x, scores (N,), tokens (N,)
    ascending int32, experts (N,) int32, w1 (2F, D, E), b1, w2 (D, F, E), b2, E, stream_id, activation_type), gate and
    up rows in turns. Its entry for a routing that is given; its own router goes another way."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    token_N, expert_N, weight_N = rows(None, expert, weight)
    stream = torch.cuda.current_stream().cuda_stream
    ours = w_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0), None
    return moe_general_routing_inputs(
        x, weight_N, token_N.int(), expert_N.int(), *ours, len(w_up), stream, ActivationType.SWIGLU
    )[0]


def sonicmoe_layout(w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up rows in turns: gate 0, up 0, gate 1, up 1, ..."""
    gate, up = w_up.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2), w_down


def transformers_experts(x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """huggingface/transformers 5, models/qwen3_moe (Qwen3MoeExperts.forward(hidden_states, top_k_index, top_k_weights))
    with its grouped_mm implementation; gate_up_proj (E, 2F, D), down_proj (E, D, F)."""
    module = _qwen3_experts(*w_down.shape)
    weights = {"gate_up_proj": w_up, "down_proj": w_down}
    return torch.func.functional_call(module, weights, (x, expert, weight.to(x.dtype)))


@functools.cache
def _qwen3_experts(n_experts: int, d: int, f: int) -> torch.nn.Module:
    """The module without memory of its own."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=f, num_experts=n_experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


OURS = "triton"
PEERS = {
    OURS: Peer(triton_experts, ("triton",)),
    "triton_fp8": Peer(triton_fp8, ("triton",), tolerance=0.15),
    "torch": Peer(torch_experts, ()),
    "grouped_mm": Peer(grouped_mm, ()),
    "transformers": Peer(transformers_experts, ("transformers",)),
    "liger": Peer(liger, ("liger_kernel",)),
    "scattermoe": Peer(scattermoe, ("scattermoe",)),
    "megablocks": Peer(megablocks, ("megablocks", "megablocks_ops", "grouped_gemm", "stk"), megablocks_layout),
    "sonicmoe": Peer(sonicmoe, ("sonicmoe", "quack", "cutlass"), sonicmoe_layout),
}


def missing(name: str) -> str:
    """The packages that a peer needs and that are not installed, in words; empty when it can be called."""
    return " and ".join(package for package in PEERS[name].packages if importlib.util.find_spec(package) is None)


class Expected(NamedTuple):
    """What the reference says of given inputs: the output and the gradients of x and of the weights of rows."""

    y: Tensor
    dx: Tensor
    dweight: Tensor


def expected(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert: Tensor, weight: Tensor, dout: Tensor, dtype: torch.dtype
) -> Expected:
    """The reference in `dtype` on inputs of any."""
    x, w_up, w_down, weight, dout = (tensor.detach().to(dtype) for tensor in (x, w_up, w_down, weight, dout))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = reference.experts(x, w_up, w_down, *rows(None, expert, weight), "swiglu")
    dx, dweight = torch.autograd.grad(y, (x, weight), dout)
    return Expected(y.detach(), dx, dweight)


def check(
    run: Experts, weights: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, want: Expected,
    tolerance: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of a peer's y, dx and dweight; weights in its layout, inputs x, expert, weight, of which the
    floats want gradients. Raises `Wrong` for one beyond rounding to the inputs' type, and beyond `tolerance`; the
    weights' gradients are not looked at."""
    x, expert, weight = inputs
    y = run(x, *weights, expert, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), dout)
    got = Expected(y.detach(), dx, dweight)
    errors = {name: relative_error(getattr(got, name), getattr(want, name)) for name in Expected._fields}
    bound = max(TOLERANCE[x.dtype], tolerance)
    bad = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= bound]
    if bad:
        raise Wrong(f"relative error of {', '.join(bad)} against the reference; {bound:g} is rounding")
    return errors
