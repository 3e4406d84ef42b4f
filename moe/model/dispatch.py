"""Backends over the same expert weights.

reference   obvious, float64-capable, slow: the definition of correct
torch       one matmul per expert in one autograd function: the fast path wherever there is no GPU
triton      fused kernels for a GPU (or, under TRITON_INTERPRET=1, Triton's interpreter: slow, for tests)

Experts that are stored in few bits (quantized.py) go through the same three, forward alone.

Letters beyond the glossary: G widths that experts have, as in experts.py.
"""

import torch
from torch import Tensor

from kernels import grouped, operands, quantized, reference, tuning
from moe.errors import BadInput
from moe.model.experts import Experts, ExpertWeights, MixedExperts
from moe.model.quantized import QuantizedExperts
from moe.routing.contract import Routing


def choose(name: str, device: torch.device) -> tuple[str, str]:
    """The backend that dispatch=`name` means on `device`, and why. Raises `BadInput` for one that cannot work there."""
    if name not in ("auto", "triton"):
        return name, "as asked"
    obstacle = tuning.obstacle(device)
    if name == "triton" and obstacle:
        raise BadInput(f"dispatch=triton cannot run here: {obstacle}. dispatch=torch can.")
    if name == "triton":
        return name, "as asked"
    if device.type == "cuda" and not obstacle:
        return "triton", f"the device is a GPU with {tuning.architecture(device)} tiles"
    return "torch", obstacle or "the device is no GPU"


def apply(
    experts: Experts | MixedExperts | QuantizedExperts, x_TD: Tensor, routing: Routing, backend: str
) -> tuple[Tensor, Tensor]:
    """Send every routed row through its expert and combine each token's rows by weight: (T, D) -> (T, D), and how many
    rows each expert got, (E,) int64. Raises `ValueError` for a routing of another form or type."""
    check(x_TD, routing, backend)
    if isinstance(experts, MixedExperts):
        return _apply_mixed(experts, x_TD, routing, backend)
    if isinstance(experts, QuantizedExperts):
        return _apply_quantized(experts, x_TD, routing, backend)
    if experts.exchange is not None:
        return _apply_elsewhere(experts, x_TD, routing, backend)
    return apply_local(experts.weights(), x_TD, routing, backend)


def apply_local(weights: ExpertWeights, x_TD: Tensor, routing: Routing, backend: str) -> tuple[Tensor, Tensor]:
    """`apply` for experts whose weights are all here."""
    w_up_EFD, w_down_EDF, b_up_EF, b_down_ED, form = weights
    if backend == "triton":
        from kernels import fused  # here, because Triton is not everywhere

        rows = (routing.token_N, routing.expert, routing.weight)
        return fused.experts(x_TD, w_up_EFD, w_down_EDF, *rows, form, _tf32(), b_up_EF, b_down_ED)
    token_N, expert_N, weight_N = routing.rows()
    arguments = (x_TD, w_up_EFD, w_down_EDF, token_N, expert_N, weight_N, form, b_up_EF, b_down_ED)
    match backend:
        case "reference":
            y_TD = reference.experts(*arguments)
        case "torch":
            y_TD = grouped.experts(*arguments)
        case _:
            raise ValueError(f"backend={backend!r} is not one of reference, torch, triton")
    return y_TD, reference.count(expert_N, len(w_up_EFD))


def _apply_quantized(experts: QuantizedExperts, x_TD: Tensor, routing: Routing, backend: str) -> tuple[Tensor, Tensor]:
    """Experts in few bits: triton reads them as they are stored, the others widen them to x's type, on every call."""
    (w_up, w_down), (token_N, expert, weight) = experts.weights(), (routing.token_N, routing.expert, routing.weight)
    biases = experts.up_bias_EF, experts.down_bias_ED
    return quantized.experts(x_TD, w_up, w_down, token_N, expert, weight, experts.form, _tf32(), *biases, backend)


def _apply_elsewhere(experts: Experts, x_TD: Tensor, routing: Routing, backend: str) -> tuple[Tensor, Tensor]:
    """Experts that the ranks of a group share out among them: each row is sent to its expert's rank and comes back.
    What is computed there is `apply_local`, of rows that each are a token of their own, with a weight of 1."""
    assert experts.exchange is not None
    n_experts = len(experts.w_up_EFD)

    def compute(row_MD: Tensor, expert_M: Tensor) -> Tensor:
        alone = Routing(expert_M[:, None], row_MD.new_ones(len(row_MD), 1, dtype=routing.weight.dtype), None)
        return apply_local(experts.weights().here(), row_MD, alone, backend)[0]

    token_N, expert_N, weight_N = routing.rows()
    count_E = reference.count(expert_N, n_experts)
    if not experts.form.weigh_input:
        return experts.exchange(x_TD, token_N, expert_N, weight_N, n_experts, compute), count_E
    row_ND = x_TD.index_select(0, token_N) * weight_N[:, None].to(x_TD.dtype)
    row_N = torch.arange(len(token_N), device=token_N.device)
    y_ND = experts.exchange(row_ND, row_N, expert_N, torch.ones_like(weight_N), n_experts, compute)
    return grouped.combine(y_ND, row_N, token_N, None, len(x_TD)), count_E


def check(x_TD: Tensor, routing: Routing, backend: str) -> None:
    """Raises `ValueError` for a routing that is not of these tokens in one of its two forms, or whose numbers of
    experts and tokens are not int64, before anything is computed from them."""
    expert, weight, token_N = routing.expert, routing.weight, routing.token_N
    form = x_TD.shape[:1] + expert.shape[-1:] if token_N is None else token_N.shape
    if expert.shape != form or weight.shape != form or (token_N is not None and token_N.dim() != 1):
        raise ValueError(
            f"dispatch={backend} takes expert and weight (T, K), or (N,) with token_N (N,); of {len(x_TD)} tokens they "
            f"are {tuple(expert.shape)}, {tuple(weight.shape)}, {None if token_N is None else tuple(token_N.shape)}."
        )
    operands.ids(f"dispatch={backend}", expert, token_N)


def _apply_mixed(experts: MixedExperts, x_TD: Tensor, routing: Routing, backend: str) -> tuple[Tensor, Tensor]:
    """Each stack of one width takes its own rows."""
    outputs = []
    for local_E, stack in zip(experts.local_GE, experts.stacks, strict=True):
        expert = torch.where(routing.expert < 0, routing.expert, local_E[routing.expert.clamp_min(0)])
        outputs.append(apply(stack, x_TD, routing._replace(expert=expert), backend)[0])  # type: ignore[arg-type]
    _, expert_N, _ = routing.rows()
    return torch.stack(outputs).sum(0), reference.count(expert_N, experts.local_GE.shape[1])


def _tf32() -> bool:
    """Whether float32 products may be rounded to tf32, as torch.set_float32_matmul_precision has it."""
    return torch.get_float32_matmul_precision() != "highest"


# torch.compile cannot trace the question. This is what torch.compiler.assume_constant_result sets, without importing
# the whole compiler here.
_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
