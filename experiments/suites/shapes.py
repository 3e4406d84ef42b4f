"""What an MoE layer must cost at least, and what this project promises: shapes, formulas and targets as data.

A floor, of gate, plan and combine, is bytes over the measured copy bandwidth, each input read once and each output
written once; the experts' matmuls are held to shares of a balanced bmm instead. Letters as in `moe/__init__.py`, and
N = T·K.
"""

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Sizes of one MoE layer on one batch."""

    T: int
    D: int
    F: int
    E: int
    K: int


class Rate(NamedTuple):
    """TF/s of the experts, forward and backward."""

    forward: float
    backward: float


SHAPES = {
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "mixtral": Shape(16384, 4096, 14336, 8, 2),
    "fine": Shape(16384, 4096, 512, 128, 8),
    "qwen3": Shape(32768, 2048, 768, 128, 8),
    "small": Shape(32768, 768, 512, 32, 4),
}
SMOKE = {"smoke": Shape(8, 16, 16, 3, 2)}  # what Triton's interpreter does in a second

# On an H100. promise: what the kernels should reach; moonshot: past the fastest published ones.
PROMISE = {
    "olmoe": Rate(480, 420),
    "mixtral": Rate(560, 520),
    "fine": Rate(440, 400),
    "qwen3": Rate(470, 400),
    "small": Rate(300, 280),
}
MOONSHOT = {
    "olmoe": Rate(560, 560),
    "mixtral": Rate(640, 620),
    "fine": Rate(510, 515),
    "qwen3": Rate(540, 540),
    "small": Rate(400, 405),
}

# Ratios in one run on one GPU, whatever the GPU.
OF_BMM = Rate(0.80, 0.70)  # of a balanced torch.bmm of the same FLOPs
OVER_PEER = {"scattermoe": 1.25, "liger": 1.25, "megablocks": 1.4}  # speed of forward and backward together
GATE_PLAN_US = 50.0
GATE_PLAN_WITHIN = Shape(32768, 0, 0, 128, 8)  # the largest T, E and K it is promised for
COMBINE_OVER_FLOOR = 1.15


def forward_flops(shape: Shape) -> int:
    """Of the experts, swiglu: 2 per weight and row, three matrices of F·D; the router is left out."""
    return 6 * shape.T * shape.K * shape.F * shape.D


def backward_flops(shape: Shape) -> int:
    """Twice forward's: every matmul has two gradients."""
    return 2 * forward_flops(shape)


def layer_bytes(shape: Shape) -> int:
    """Bytes the experts' forward moves at least in 16 bits: x, both weights and y once. The roofline's denominator."""
    return 2 * (2 * shape.T * shape.D + 3 * shape.E * shape.F * shape.D)


def gate_bytes(shape: Shape) -> int:
    """Read float32 logits; write ids (int64), weights and log-sum-exp (float32), and the experts' sums."""
    return 4 * shape.T * shape.E + 12 * shape.T * shape.K + 4 * shape.T + 4 * shape.E


def gate_backward_bytes(shape: Shape) -> int:
    """Read logits, ids and all three gradients; write the logits' gradient."""
    return gate_bytes(shape) + 4 * shape.T * shape.E


def plan_bytes(shape: Shape) -> int:
    """Read ids (int64); write two maps, a token per slot and the offsets (int32). The schedule of tiles is too small
    to count."""
    return 20 * shape.T * shape.K + 4 * (shape.E + 1)


def gate_plan_bytes(shape: Shape) -> int:
    """Gate and plan as one: the ids are written and not read again."""
    return gate_bytes(shape) + plan_bytes(shape) - 8 * shape.T * shape.K


def combine_bytes(shape: Shape, weighted: bool, itemsize: int = 2) -> int:
    """Read N rows, their slots (int32) and, forward, their weights (float32); write T rows."""
    rows = shape.T * shape.K
    return itemsize * shape.D * (rows + shape.T) + (8 if weighted else 4) * rows


def saved_bytes(shape: Shape) -> int:
    """Bytes per token that a layer may keep for backward in 16 bits: x, the pre-activation, and O(K) (32·K here) for
    the routing."""
    return 2 * shape.D + 4 * shape.K * shape.F + 32 * shape.K


def gate_plan_promised(shape: Shape) -> bool:
    """Whether the promise of `GATE_PLAN_US` covers these sizes."""
    bound = GATE_PLAN_WITHIN
    return shape.T <= bound.T and shape.E <= bound.E and shape.K <= bound.K


def target(what: str, value: float, bound: float, at_most: bool = False) -> dict[str, Any]:
    """One target of a row and whether it is met; a value that is no number meets none."""
    met = value <= bound if at_most else value >= bound
    return {"what": what, "value": value, "bound": bound, "at_most": at_most, "met": met}
