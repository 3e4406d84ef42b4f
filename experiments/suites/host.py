"""Suite host: what a call of the Triton experts costs the host, forward and backward, on any machine.

Kernels are not launched: a stand-in takes their place, so that what is left is Python, torch's dispatch and autograd,
and on a CPU the few torch operations themselves, on sizes at which they are next to nothing. Triton's own launch, a few
microseconds each, is left out; how many launches there are stands beside it. A layer is bound by the host where the
GPU's kernels take less than this.

    python -m experiments.bench suite=host    # -> runs/bench

Without a GPU the tiles are an H100's, whose descriptors for the copy engine are made on the host. A row is one way to
name rows: each token's K experts, or a list of rows (N,) with their tokens.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.pages import tables
from experiments.suites.cases import Case
from experiments.suites.shapes import Shape
from kernels import tuning

HEADINGS = ("rows", "grad", "forward µs", "torch calls", "launches", "backward µs", "torch calls", "launches")
FORMS = ("tokens", "listed")  # (T, K), or (N,) with token_N
PARTS = ("forward", "backward")
LAYER = Shape(64, 64, 64, 8, 2)  # sizes that need no masks, as a model's do


class Asked(NamedTuple):
    """What is measured."""

    device: torch.device
    calls: int  # of each part, timed one by one


def settings(device: torch.device, full: bool, rounds: int) -> Asked:
    """Two hundred calls for each of `rounds`, or a few."""
    return Asked(device, 200 * rounds if full else 3)


def cases(asked: Asked) -> Iterator[Case]:
    """A row for each way to name rows, with gradients and without."""
    for form in FORMS:
        for grad in (False, True):
            yield Case({"suite": "host", "rows": form, "grad": grad}, functools.partial(measure, asked, form, grad))


def measure(asked: Asked, form: str, grad: bool) -> dict[str, Any]:
    """One row: the median call, what torch does in one, and the kernels that it would launch."""
    forward, backward = layer(asked.device, form, grad)
    row: dict[str, Any] = {**LAYER._asdict(), "calls": asked.calls}
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    with standing_in(asked.device) as launches:
        # Once for what is made at the first call.
        out = forward()
        if grad:
            backward(out)
        # Often, each call by itself.
        for _ in range(asked.calls):
            begun = time.perf_counter()
            out = forward()
            between = time.perf_counter()
            seconds["forward"].append(between - begun)
            if grad:
                backward(out)
                seconds["backward"].append(time.perf_counter() - between)
        # And once to count.
        launches.clear()
        row["forward_torch_calls"], row["forward_launches"] = torch_calls(forward), len(launches)
        if grad:
            out = forward()
            launches.clear()
            row["backward_torch_calls"], row["backward_launches"] = torch_calls(lambda: backward(out)), len(launches)
    return row | {f"{part}_us": 1e6 * statistics.median(values) for part, values in seconds.items() if values}


def layer(device: torch.device, form: str, grad: bool) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
    """The experts' output on small operands, and all gradients of it. Nothing of either is a number that counts."""
    from kernels import fused  # here, because Triton is not everywhere

    t, d, f, e, k = LAYER
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=grad)
    x, w_up, w_down, weight = draw(t, d), draw(e, 2 * f, d), draw(e, d, f), draw(t, k).detach().requires_grad_(grad)
    expert, dout = torch.randn(t, e, device=device).topk(k).indices, torch.randn_like(x)
    token_N = None
    if form == "listed":
        token_N, expert = torch.arange(t, device=device).repeat_interleave(k), expert.flatten()
        weight = weight.detach().flatten().requires_grad_(grad)
    forward = lambda: fused.experts(x, w_up, w_down, token_N, expert, weight, "swiglu")[0]
    return forward, lambda out: torch.autograd.grad(out, (x, w_up, w_down, weight), dout)


@contextmanager
def standing_in(device: torch.device) -> Iterator[list[str]]:
    """Inside, a kernel that is launched only leaves its name in the list."""
    from kernels.ragged_mm import _ragged_mm  # here, because Triton is not everywhere

    launches: list[str] = []

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(self.fn.__name__)

    tiles = tuning.target("sm_90") if device.type == "cpu" else nullcontext()
    with tiles, patch.object(type(_ragged_mm), "run", launch):  # compiled or interpreted, as they are here
        yield launches


class Counting(TorchDispatchMode):
    """Counts the operations that torch does, those of our own ops among them."""

    def __init__(self) -> None:
        from kernels import fused  # here, because Triton is not everywhere

        super().__init__()
        self.calls = 0
        self.inside = {op._opoverload: op._init_fn for op in vars(fused).values() if isinstance(op, CustomOpDef)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        self.calls += 1
        return func(*args, **(kwargs or {}))


def torch_calls(function: Callable[[], Any]) -> int:
    """Torch's operations that a call does, those within them left out."""
    with Counting() as counting:
        function()
    return counting.calls


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = "(T, K)" if row["rows"] == "tokens" else "(N,)", "yes" if row["grad"] else "no"
    if row["status"] != "measured":
        return *head, row["status"], *[""] * 4, row["error"][:60]
    words = []
    for part in PARTS:
        words += [tables.number(row.get(f"{part}_{what}"), ",.0f") for what in ("us", "torch_calls", "launches")]
    return *head, *words
