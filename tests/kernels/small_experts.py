"""A small layer's arguments, and how wrong the kernels' output and gradients of it are."""

import torch

from kernels import grouped, reference
from kernels.form import form_of
from kernels.fused import experts
from tests.kernels.test_plan import DEVICE, poisoned

RESULTS = ("out", "x", "w_up", "w_down", "weight")  # of the last four, the gradients


def layer_arguments(
    expert, token=None, n_tokens=None, n_experts=5, d=20, f=12, form="swiglu", dtype=torch.float64, biased=False,
    by_columns=False,
):  # fmt: skip
    """Everything `experts` takes, by name, at unit scale around these rows: nested lists or tensors; with biases, and
    with matrices stored by columns, where asked for."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)
    expert = torch.as_tensor(expert, dtype=torch.int64, device=DEVICE)
    n_tokens = n_tokens or len(expert)
    width, like = form_of(form).width(f), form_of(form)
    tensors = {
        "x": draw(n_tokens, d) * (4 if like.limit else 1),  # far enough that some are cut off
        "w_up": draw(n_experts, width, d) / d**0.5,
        "w_down": draw(n_experts, d, f) / f**0.5,
        "weight": draw(*expert.shape).abs() + 0.5,
    }
    if biased:
        tensors |= {"b_down": draw(n_experts, d)} | ({} if like.weigh_input else {"b_up": draw(n_experts, width)})
    if by_columns:
        tensors |= {name: tensors[name].mT.contiguous().mT for name in ("w_up", "w_down")}
    kinds = {"weight": dtype if dtype == torch.float64 else torch.float32}
    tensors = {name: each.to(DEVICE, kinds.get(name, dtype)).requires_grad_() for name, each in tensors.items()}
    token = None if token is None else torch.as_tensor(token, dtype=torch.int64, device=DEVICE)
    arguments = {**tensors, "token": token, "expert": expert, "form": form}
    order = ("x", "w_up", "w_down", "token", "expert", "weight", "form")
    biases = {"b_up_EF": arguments.get("b_up"), "b_down_ED": arguments.get("b_down")} if biased else {}
    return {name: arguments[name] for name in order} | biases


def call(function, arguments, **rest):
    """A backend's experts of these arguments, biases by name."""
    biases = {name: arguments[name] for name in ("b_up_EF", "b_down_ED") if name in arguments}
    return function(*(each for name, each in arguments.items() if name not in biases), **biases, **rest)


def named_gradients(out, arguments):
    """The output and every gradient, by name, for one gradient of the output."""
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    names = [name for name in (*RESULTS[1:], "b_up_EF", "b_down_ED") if arguments.get(name) is not None]
    inputs = [arguments[name] for name in names]
    gradients = torch.autograd.grad(out, inputs, dout, allow_unused=True, materialize_grads=True)
    return dict(zip(("out", *names), (out.detach(), *gradients), strict=True))


def run_kernels(arguments, **rest):
    """Output and gradients of the kernels, on poisoned memory."""
    with poisoned():
        return named_gradients(call(experts, arguments, **rest)[0], arguments)


def run_rows(arguments, function, dtype=None):
    """Output and gradients of another implementation, over flat rows, in this dtype."""
    cast = lambda each: each.detach().to(dtype or each.dtype).requires_grad_() if each.requires_grad else each
    arguments = {name: cast(each) if torch.is_tensor(each) else each for name, each in arguments.items()}
    expert = arguments["expert"]
    token = arguments["token"]
    if token is None:
        token = torch.arange(len(expert), device=DEVICE).repeat_interleave(expert.shape[1])
    rows = {"token": token, "expert": expert.flatten(), "weight": arguments["weight"].flatten()}
    return named_gradients(call(function, {**arguments, **rows}), arguments)


def relative_errors(got, want):
    """Name -> relative Frobenius error; nothing against nothing is right."""
    error = lambda a, b: (a.double() - b).norm() / b.norm() if b.any() else a.double().norm()
    return {name: error(got[name], want[name]).item() for name in want}


def wrong_results(arguments, **rest):
    """Names of the results that the kernels get wrong. The check that this file makes, so that it can be checked."""
    want, dtype = run_rows(arguments, reference.experts, torch.float64), arguments["x"].dtype
    bounds = dict.fromkeys(want, 1e-12)
    if dtype != torch.float64:
        factor = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
        bounds = {
            name: factor * each for name, each in relative_errors(run_rows(arguments, grouped.experts), want).items()
        }
    got = run_kernels(arguments, **rest)
    assert all(each.dtype == arguments[name].dtype for name, each in got.items() if name != "out")
    assert all(got[name].stride() == arguments[name].stride() for name in ("w_up", "w_down") if got[name].numel())
    return [name for name, error in relative_errors(got, want).items() if not error <= bounds[name]]
