"""Whether the kernels compute what the reference says, on the device itself: the layer of experts, and how it behaves.

Errors are relative to float64 on the same inputs, of the output and every gradient, and may be twice those of the torch
backend in the same type. Outputs are allocated full of NaN, so that an element nobody writes shows. The kernels one by
one are in `experiments/suites/kernel_checks.py`.

    python -m experiments.gpu_evidence --out DIR --stage correctness    # a row per check -> DIR/gpu-correctness.jsonl
    python -m experiments.suites.layer_checks    # a small layer forward and backward: what compute-sanitizer runs on
"""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.suites import facts, timing
from experiments.suites.cases import Absent, Case, LeftOut
from experiments.suites.layer import choices
from experiments.suites.shapes import Shape
from kernels import grouped, reference
from kernels.form import Form
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.layer import MoELayer
from moe.routing.contract import rows
from moe.run.command_line import Options

# name -> (dtype, whether float32 is multiplied in tf32, the error that is always allowed: one rounding, or for exact
# sums a few)
DTYPES = {
    "bf16": (torch.bfloat16, False, 2**-8),
    "fp16": (torch.float16, False, 2**-11),
    "fp32": (torch.float32, False, 2e-6),
    "tf32": (torch.float32, True, 2**-10),
    "fp64": (torch.float64, False, 1e-14),
}
LOADS = ("uniform", "zipf", "one expert", "two experts", "dropped", "all dropped", "ragged")
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2")
IN_FP8 = "swiglu in fp8"
NAMES = ("y", "dx", "dw_up", "dw_down", "dweight")
TIMES_TORCH = 2.0
SANITIZER_SECONDS = 150.0  # that compute-sanitizer may take
HEADINGS = ("check", "of", "type", "result", "largest error", "torch's", "remark")


@dataclass
class Settings:
    """What is checked."""

    device: torch.device
    regular: Shape
    odd: Shape  # rows that do not start on 16 bytes, sizes that divide nothing
    large: Shape
    dtypes: Sequence[str] = tuple(DTYPES)
    loads: Sequence[str] = LOADS
    tokens: Sequence[int] = (0, 1, 33)
    activations: Sequence[str] = ACTIVATIONS
    most_choices: int = 9
    reruns: int = 20
    compiler: str = "inductor"
    interpreted: bool = False  # Triton's interpreter truncates to bf16 where a GPU rounds


def settings(device: torch.device, full: bool) -> Settings:
    """All of it, or what the interpreter does in a minute."""
    interpreted = device.type != "cuda"
    if full:
        sizes = Shape(1024, 256, 128, 16, 4), Shape(777, 100, 52, 7, 3), Shape(2048, 1024, 512, 64, 8)
        return Settings(device, *sizes, interpreted=interpreted)
    return Settings(
        device, Shape(12, 16, 16, 4, 2), Shape(9, 20, 12, 3, 2), Shape(20, 24, 16, 4, 3), ("bf16", "tf32", "fp64"),
        ("uniform", "dropped", "ragged"), (0, 33), ("swiglu", "gelu"), 1, 2, "aot_eager", interpreted,
    )  # fmt: skip


class Layer(NamedTuple):
    """Operands of one layer, floats wanting gradients."""

    x_TD: Tensor
    w_up_EFD: Tensor
    w_down_EDF: Tensor
    weight: Tensor
    expert: Tensor  # (T, K), or (N,) with token_N
    token_N: Tensor | None
    dout_TD: Tensor
    activation: str
    tf32: bool

    def of(self, dtype: torch.dtype) -> "Layer":
        """The same numbers in another type; the rows' weights have float32 at least."""
        cast = lambda tensor, dtype: tensor.detach().to(dtype).requires_grad_()
        floats = {name: cast(getattr(self, name), dtype) for name in ("x_TD", "w_up_EFD", "w_down_EDF")}
        floats["weight"] = cast(self.weight, torch.promote_types(dtype, torch.float32))
        return self._replace(**floats, dout_TD=self.dout_TD.to(dtype))

    def results(self, run: Callable[["Layer"], Tensor]) -> tuple[Tensor, ...]:
        """y and the gradients of x, both weights and the rows' weights, as in `NAMES`."""
        wanted = (self.x_TD, self.w_up_EFD, self.w_down_EDF, self.weight)
        y_TD = run(self)
        if not y_TD.requires_grad:  # no rows at all
            return (y_TD, *(torch.zeros_like(operand) for operand in wanted))
        gradients = torch.autograd.grad(y_TD, wanted, self.dout_TD, allow_unused=True, materialize_grads=True)
        return y_TD.detach(), *gradients


def draw(shape: Shape, device: torch.device, kind: str, load: str = "uniform", activation: str = "swiglu") -> Layer:
    """Random operands of unit scale in a type of `DTYPES`; weights of rows stay float32, or float64 with the rest."""
    (t, d, f, e, _), (dtype, tf32, _) = shape, DTYPES[kind]
    torch.manual_seed(1)
    make = lambda *shape, scale=1.0: (torch.randn(*shape, device=device, dtype=torch.float32) * scale).to(dtype)
    expert, token_N = routed(shape, load, device)
    weight = torch.rand(expert.shape, device=device, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    width = form(activation).width(f)
    x, w_up, w_down = make(t, d), make(e, width, d, scale=d**-0.5), make(e, d, f, scale=f**-0.5)
    for operand in (x, w_up, w_down, weight):
        operand.requires_grad_()
    return Layer(x, w_up, w_down, weight, expert, token_N, make(t, d), activation, tf32)


def routed(shape: Shape, load: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Expert ids of one of `LOADS`: (T, K) and None, or (N,) and the token of each row, ascending, some with none."""
    t, e, k = shape.T, shape.E, shape.K
    if load in ("uniform", "zipf"):
        return choices(shape, load, device), None
    if load == "one expert":
        return torch.full((t, k), e - 1, device=device), None
    if load == "all dropped":
        return torch.full((t, k), -1, device=device), None
    expert = torch.randint(e, (t, k), device=device)
    if load == "two experts":
        return (expert % 2) * (e - 1), None
    if load == "dropped":
        return torch.where(torch.rand(t, k, device=device) < 0.2, -1, expert), None
    assert load == "ragged", load
    token_N = torch.randint(max(1, t), (t * k,), device=device).sort().values
    return torch.where(torch.rand(t * k, device=device) < 0.1, -1, expert.flatten()), token_N


def form(activation: str) -> Form:
    """What a layer of this kind computes."""
    return Form("swiglu", fp8="all") if activation == IN_FP8 else Form(activation)


def by_reference(layer: Layer) -> Tensor:
    """y as the reference defines it."""
    token_N, expert_N, weight_N = rows(layer.token_N, layer.expert, layer.weight)
    operands = (layer.x_TD, layer.w_up_EFD, layer.w_down_EDF, token_N, expert_N, weight_N)
    return reference.experts(*operands, form(layer.activation))


def by_torch(layer: Layer) -> Tensor:
    """y as dispatch=torch computes it."""
    token_N, expert_N, weight_N = rows(layer.token_N, layer.expert, layer.weight)
    operands = (layer.x_TD, layer.w_up_EFD, layer.w_down_EDF, token_N, expert_N, weight_N)
    return grouped.experts(*operands, form(layer.activation))


def by_triton(layer: Layer) -> Tensor:
    """y as dispatch=triton computes it."""
    from kernels import fused  # here, because Triton is not everywhere

    operands = (layer.x_TD, layer.w_up_EFD, layer.w_down_EDF, layer.token_N, layer.expert, layer.weight)
    return fused.experts(*operands, form(layer.activation), layer.tf32)[0]


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, newly allocated tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def multiplying(tf32: bool) -> Iterator[None]:
    """Inside, torch multiplies float32 in tf32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cases(settings: Settings) -> Iterator[Case]:
    """The layer, what holds of it whatever the numbers, and the tools that watch it; by importance, and such that sizes
    that compile the same kernels stand together."""

    def layer(shape: Shape, kind: str, load: str = "uniform", activation: str = "swiglu") -> Case:
        key = {"suite": "correctness", "check": "layer", **shape._asdict(), "dtype": kind, "load": load}
        return Case(
            key | {"activation": activation}, functools.partial(check_layer, settings, shape, kind, load, activation)
        )

    def other(name: str, function: Callable[..., dict[str, Any]], *arguments: Any, dtype: str = "bf16") -> Case:
        key = {"suite": "correctness", "check": name, "dtype": dtype}
        return Case(key, functools.partial(function, settings, *arguments))

    # The layer: every type, then every load and number of tokens in the type that models train in, then odd sizes.
    for kind in settings.dtypes:
        yield layer(settings.regular, kind)
    for load in settings.loads[1:]:
        yield layer(settings.regular, "bf16", load)
    for t in settings.tokens:
        yield layer(settings.regular._replace(T=t), "bf16")
    for kind in settings.dtypes:
        yield layer(settings.odd, kind, "ragged")

    # What holds whatever the numbers.
    for kind in ("bf16", "fp32"):
        if kind in settings.dtypes:
            yield other("the same bits on every run", check_reruns, kind, dtype=kind)
    yield other("a replayed graph follows new inputs", check_graph)
    yield other("a replayed graph routes new tokens", check_whole_graph, dtype="fp32")
    yield other("compiled whole", check_compiled)

    # The layer again, where it takes another kernel or much memory: every K, every activation, large sizes.
    for k in range(1, settings.most_choices + 1):
        yield layer(settings.regular._replace(K=k, E=max(settings.regular.E, k), T=settings.regular.T // 2 + 1), "bf16")
    for kind, activation in itertools.product(("bf16", "fp32"), settings.activations[1:]):
        if kind in settings.dtypes:
            yield layer(settings.regular, kind, "zipf", activation)
    yield layer(settings.large, "bf16", "zipf")
    # In fewer bits. Sums of fp8 on tensor cores are less exact than float32, which 16 bits do not tell.
    for shape in (settings.regular, settings.odd):
        yield layer(shape, "bf16", "zipf", IN_FP8)
    yield other("D past 2^31 elements", check_far, "D")
    yield other("F past 2^31 elements", check_far, "F")

    # Under the tools that watch memory, which take longest.
    for tool in ("memcheck", "racecheck"):
        yield other(f"compute-sanitizer {tool}", check_sanitizer, tool)


def check_layer(settings: Settings, shape: Shape, kind: str, load: str, activation: str) -> dict[str, Any]:
    """Errors of the output and every gradient against the reference in float64, beside the torch backend's."""
    layer = draw(shape, settings.device, kind, load, activation)
    want = layer.of(torch.float64).results(by_reference)
    with multiplying(layer.tf32):
        theirs = layer.results(by_torch)
    with poisoned():
        got = layer.results(by_triton)
    return verdict(settings, kind, NAMES, got, want, theirs)


def verdict(
    settings: Settings, kind: str, names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor],
    theirs: Sequence[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Errors by name, and a status of "wrong" with the names of those that exceed their bounds."""
    dtype, _, floor = DTYPES[kind]
    looser = 3 if settings.interpreted and dtype.itemsize == 2 else 1
    errors, torchs, bad = {}, {}, []
    for name, a, b, c in zip(names, got, want, theirs, strict=True):
        errors[name], torchs[name] = timing.relative_error(a, b), timing.relative_error(c, b)
        bound = looser * max(TIMES_TORCH * torchs[name], floor)
        if not errors[name] <= bound:
            bad.append(f"{name} {errors[name]:.2g} > {bound:.2g}")
    result: dict[str, Any] = {"errors": errors, "torch_errors": torchs}
    return result | ({"status": "wrong", "error": f"errors exceed bounds: {', '.join(bad)}"} if bad else {})


def check_reruns(settings: Settings, kind: str) -> dict[str, Any]:
    """Bitwise equal output and gradients, run after run."""
    layer = draw(settings.regular, settings.device, kind, "zipf")
    first = layer.results(by_triton)
    differ = set()
    for _ in range(settings.reruns):
        again = layer.results(by_triton)
        differ |= {name for name, a, b in zip(NAMES, first, again, strict=True) if not torch.equal(a, b)}
    result: dict[str, Any] = {"reruns": settings.reruns}
    return result | ({"status": "wrong", "error": f"{', '.join(sorted(differ))} differ between runs"} if differ else {})


def check_graph(settings: Settings) -> dict[str, Any]:
    """Forward and backward captured on one routing, replayed on another: nothing of the plan is known to the host."""
    layer = draw(settings.regular, settings.device, "bf16")

    def change() -> None:
        layer.x_TD.copy_(torch.randn_like(layer.x_TD))
        layer.expert.copy_(routed(settings.regular, "zipf", settings.device)[0])

    return replayed(settings, lambda: layer.results(by_triton), change, NAMES)


def replayed(
    settings: Settings, results: Callable[[], Sequence[Tensor]], change: Callable[[], Any], names: Sequence[str]
) -> dict[str, Any]:
    """Whether a graph that was captured before a change of its inputs gives, replayed, what a call gives after it.
    Raises `Absent` without a GPU."""
    graph = timing.captured(results, settings.device)
    if graph is None:
        raise Absent("graphs need a GPU")
    with torch.no_grad():
        change()
    want = results()
    graph.replay()
    differ = [name for name, a, b in zip(names, graph.result, want, strict=True) if not torch.equal(a, b)]
    return {"status": "wrong", "error": f"{', '.join(differ)} of the replay differ"} if differ else {}


def whole_layer(settings: Settings) -> tuple[MoELayer, Tensor, tuple[str, ...], Callable[..., list[Tensor]]]:
    """An MoE layer with its router, its input (1, T, D), and what gives output and gradients, by name, of a call of it:
    the losses included."""
    shape = settings.regular
    moe = MoEConfig(n_experts=shape.E, k=shape.K, d_expert=shape.F)
    module = MoELayer(ModelConfig(d_model=shape.D, moe=moe), moe, RouterConfig()).to(settings.device)
    torch.manual_seed(2)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x_BSD = torch.randn(1, shape.T, shape.D, device=settings.device, requires_grad=True)

    def results(call: Callable[..., Any]) -> list[Tensor]:
        y_BSD, report = call(x_BSD, "triton")
        loss = y_BSD.square().mean() + report.aux + report.z
        return [y_BSD.detach(), *torch.autograd.grad(loss, (x_BSD, *module.parameters()))]

    return module, x_BSD, ("y", "dx", *(f"d{name}" for name, _ in module.named_parameters())), results


def check_whole_graph(settings: Settings) -> dict[str, Any]:
    """A whole MoE layer forward and backward captured once, gate and plan with it, and replayed on other tokens."""
    module, x_BSD, names, results = whole_layer(settings)
    return replayed(settings, lambda: results(module), lambda: x_BSD.normal_(), names)


def check_compiled(settings: Settings) -> dict[str, Any]:
    """A whole MoE layer, router and losses included, under torch.compile in one graph: what the eager call gives."""
    module, _, names, results = whole_layer(settings)
    want = results(module)
    got = results(torch.compile(module, fullgraph=True, backend=settings.compiler))
    errors = {name: timing.relative_error(a, b) for name, a, b in zip(names, got, want, strict=True)}
    bad = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= 1e-5]
    result: dict[str, Any] = {"errors": errors}
    return result | ({"status": "wrong", "error": f"differ from the eager call: {', '.join(bad)}"} if bad else {})


def check_far(settings: Settings, wide: str) -> dict[str, Any]:
    """Rows times width past 2^31 elements, where a 32-bit offset wraps: sampled tokens, the last slots' among them."""
    shape = Shape(131072, 4160, 64, 4, 4) if wide == "D" else Shape(131072, 64, 2112, 4, 4)
    needed = 2 * shape.T * shape.K * (3 * shape.D + 7 * shape.F) + 16 * shape.T * shape.D
    if settings.device.type != "cuda":
        raise LeftOut(f"takes {needed / 2**30:.0f} GiB and a GPU")
    free = torch.cuda.mem_get_info(settings.device)[0]
    if needed > free:
        raise LeftOut(f"takes {needed / 2**30:.0f} GiB; {free / 2**30:.0f} are free")
    layer = draw(shape, settings.device, "bf16")
    got = layer.results(by_triton)
    # Tokens whose rows lie in the last expert's last slots, and some others.
    last = (layer.expert == shape.E - 1).any(1).nonzero().squeeze(1)[-64:]
    sample = torch.cat((last, torch.randint(shape.T, (64,), device=settings.device)))
    few = layer._replace(
        x_TD=layer.x_TD.detach()[sample], expert=layer.expert[sample], weight=layer.weight.detach()[sample],
        dout_TD=layer.dout_TD[sample],
    )  # fmt: skip
    want, theirs = few.of(torch.float64).results(by_reference), few.of(torch.bfloat16).results(by_torch)
    names, at = ("y", "dx", "dweight"), (0, 1, 4)
    return verdict(
        settings, "bf16", names, [got[i][sample] for i in at], [want[i] for i in at], [theirs[i] for i in at]
    )


def check_sanitizer(settings: Settings, tool: str) -> dict[str, Any]:
    """This file's command under compute-sanitizer."""
    if settings.device.type != "cuda":
        raise Absent("compute-sanitizer watches a GPU")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        raise Absent("compute-sanitizer is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "experiments.suites.layer_checks"]
    # Without torch's cache of memory, an access past a tensor is an access past an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    keywords: dict[str, Any] = {"timeout": SANITIZER_SECONDS, "env": environment, "cwd": facts.ROOT}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **keywords)
    except subprocess.TimeoutExpired:
        raise LeftOut(f"not done after {SANITIZER_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return {}
    lines = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if line.strip("= ")]
    return {"status": "wrong", "error": f"exit {done.returncode}: {' | '.join(lines[:2] + lines[-1:])[:300]}"}


def small(device: torch.device) -> None:
    """A layer forward and backward in two types, gate included, at sizes that leave no tile full."""
    from kernels import gate

    logits = torch.randn(40, 5, device=device, requires_grad=True)
    _, weight, lse, prob = gate.gate(logits, 2, "softmax")
    (weight.sum() + lse.sum() + prob.square().sum()).backward()
    for kind in ("bf16", "fp32"):
        draw(Shape(40, 72, 48, 5, 2), device, kind, "dropped").results(by_triton)
    timing.synchronize(device)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    names = ("op", "T", "D", "F", "E", "K", "load", "activation")
    of = " ".join(str(row[name]) for name in names if name in row)
    worst = max(row.get("errors", {}).items(), key=lambda item: item[1] or 0, default=(None, None))
    torchs = row.get("torch_errors", {}).get(worst[0])
    number = lambda value: "" if value is None else f"{value:.1e}"
    result = "ok" if row["status"] == "measured" else row["status"]
    return row["check"], of, row["dtype"], result, number(worst[1]), number(torchs), row.get("error", "")[:80]


def main() -> None:
    """Run `small`."""
    options = Options(__doc__)
    options.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    try:
        small(timing.find_device(options.parse_args().device, "--device"))
    except BadInput as bad:
        options.error(str(bad))


if __name__ == "__main__":
    main()
