"""What to say about routing, from counts. Formulas and sources: each function's docstring."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.run.summary import LayerMetrics


def max_violation(count_E: Tensor) -> float:
    """max_i c_i / mean c − 1: 0 when even (MaxVio, 2408.15664, eq. 4). No routed row gives 0."""
    mean = count_E.double().mean().item()
    return count_E.max().item() / mean - 1 if mean else 0.0


def load_entropy(count_E: Tensor) -> float:
    """H(f) / ln E with f_i = c_i / sum c: 1 when even, 0 when one expert takes everything. One expert gives 1."""
    if count_E.numel() == 1 or not count_E.sum():
        return 1.0
    share_E = count_E.double() / count_E.sum()
    return (torch.special.entr(share_E).sum() / math.log(count_E.numel())).item()


def dead_experts(count_E: Tensor) -> int:
    """Experts that no row reached."""
    return int((count_E == 0).sum())


def effective_experts(count_E: Tensor) -> float:
    """e^H(f) with f_i = c_i / sum c: E when even, 1 when one expert takes everything. No routed row gives 0."""
    if not count_E.sum():
        return 0.0
    return math.exp(torch.special.entr(count_E.double() / count_E.sum()).sum().item())


def load_ratio(count_E: Tensor) -> Tensor:
    """c_i / m with m = sum c / E, (E,) float64: 1 is a fair share, 0 is dead. Without any rows all are 0."""
    mean = count_E.double().mean()
    return count_E.double() / mean if mean else count_E.double()


def starved_experts(count_E: Tensor, share: float = 0.1) -> int:
    """Experts with less than this share of a fair load, dead ones among them."""
    return int((load_ratio(count_E) < share).sum())


def cv_squared(value_E: Tensor) -> float:
    """Var(c) / mean(c)², of a load or of an importance, which is the sum of a token's weights (Shazeer 2017,
    1701.06538): 0 when even, E − 1 when one expert takes everything. Without any rows 0."""
    value_E = value_E.double()
    mean = value_E.mean()
    return (value_E.var(correction=0) / mean**2).item() if mean else 0.0


def coverage(count_E: Tensor) -> Tensor:
    """Share of the rows that the busiest n experts take, for n = 1 to E, (E,) float64: n / E when even. Without any
    rows 0."""
    return count_E.double().sort(descending=True).values.cumsum(0) / max(1, int(count_E.sum()))


def gini(count_E: Tensor) -> float:
    """Gini's coefficient of the load: sum_ij |c_i − c_j| / (2 E sum c): 0 when even, 1 − 1/E when one expert takes
    everything. Without any rows 0."""
    n = len(count_E)
    ascending = count_E.double().sort().values
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    total = ascending.sum().item()
    return ((2 * rank - n - 1) @ ascending / (n * total)).item() if total else 0.0


def rows_of(count_E: Tensor, tokens: int, work: Sequence[float] | None = None) -> float:
    """What experts computed per token: their rows, each times its expert's work (`MoEConfig.work`; 1 by default)."""
    work_E = torch.ones(len(count_E)) if work is None else torch.tensor(work)
    return (count_E.double() @ work_E.to(count_E.device, torch.float64)).item() / max(1, tokens)


def layer_metrics(
    layer: int,
    count_E: Tensor,
    dropped: int,
    skipped: int,
    tokens: int,
    work: Sequence[float] | None = None,
    losses: dict[str, float] | None = None,
    seen: dict[str, Tensor] | None = None,
) -> LayerMetrics:
    """What to say of one layer. The window is what was counted: one optimiser step, its micro-batches summed, or a
    whole validation. `dropped` counts rows, `skipped` tokens that no expert took; `work` as in `rows_of`. `seen`,
    where the layer is watched: "entropy" and "prob" (E,) of the tokens' probabilities, summed over the tokens; and of
    this moment "bias" (E,) and "gradient" (E,), the experts' gradient norms. What is on a GPU makes it wait several
    times: bring it to the host first."""
    return LayerMetrics(
        layer=layer,
        max_vio=max_violation(count_E),
        load_entropy=load_entropy(count_E),
        effective_experts=effective_experts(count_E),
        dead=dead_experts(count_E),
        dropped=dropped / max(1, int(count_E.sum()) + dropped),
        skipped=skipped / max(1, tokens),
        rows=rows_of(count_E, tokens, work),
        losses=losses or {},
        starved=starved_experts(count_E),
        **watched(seen or {}),  # type: ignore[arg-type]
    )


def watched(seen: dict[str, Tensor]) -> dict[str, float | None]:
    """The fields of `LayerMetrics` that `seen` (as in `layer_metrics`) has something for."""
    fields: dict[str, float | None] = {}
    if "entropy" in seen:  # probabilities sum to 1 for every token
        n_experts, n_tokens = len(seen["prob"]), seen["prob"].sum().item()
        fields["entropy"] = seen["entropy"].item() / max(1.0, n_tokens) / math.log(max(2, n_experts))
    if "bias" in seen:
        fields["bias"] = seen["bias"].abs().max().item()
    if "gradient" in seen:
        median = seen["gradient"].double().median().item()
        fields["weakest"] = seen["gradient"].min().item() / median if median else None
    return fields
