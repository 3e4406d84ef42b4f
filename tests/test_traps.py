"""The traps of training on many ranks, put back one by one: a claim that holds fails with each of them.

`TRAPS` says of every one: the bug, as a change of the code that each rank makes for as long as a claim is tried; the
claim; and the sign it is told by. The claims are the suite's equality with one process, checkpoints that are read as
they were written, a rerun to the bit, transfers that end.

What cannot be put back here:

- A factor of division that a mesh of one rank ignores: nothing is divided, so there is no factor to ignore. What is put
  back is the mean that needs one.
- torch.compile's own, sizes that it does not know and names of groups in its cache: bugs of versions of torch. That
  compiled blocks train as one process is a claim of tests/moe/train/test_parallelize.py.
- Plans of checkpoints that all go through rank 0, too slow at thousands of ranks; what NCCL gathers in a GPU's memory;
  the order of a GPU's streams; pinned memory: none of these is there with two processes on a CPU.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import moe.data.loader
from experiments.suites import equalities
from experiments.suites.equalities import Trace, batch_of, compared, config, of_rank, trained
from experiments.suites.local_ranks import LocalRanks
from kernels import reference
from moe.config.parallel import Layout, ParallelConfig
from moe.config.run import Config
from moe.errors import BadInput
from moe.model.experts import ExpertWeights
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer, model_tensors
from moe.parallel import exchange, gradients
from moe.parallel.collectives import Ranks, n_ranks, rank, this_rank
from moe.parallel.gradients import local, squared_norm, whole
from moe.parallel.mesh import Meshes, build_meshes
from moe.run import checkpoint, sharded, shards
from moe.run.checkpoint import Snapshot
from moe.train import parallelize, step
from moe.train.optimizer import build_optimizer, optimizer_tensors
from moe.train.state import load_onto

SHARDED, EP, COPIES = Layout(1, 2, 1), Layout(1, 2, 2), Layout(2, 1, 1)
PATIENCE = 4.0  # seconds for a transfer that is not to end
AT_EASE = 60.0  # and for one that is

Bug = Callable[[], AbstractContextManager[Any]]


class Ended(NamedTuple):
    """What a rank answers instead: the error it ended with."""

    error: str


class Stopped(Exception):
    """A rank ended with an error."""


@pytest.fixture(scope="module")
def ranks():
    """Two ranks that no other test meets."""
    with LocalRanks(2) as ranks:
        yield ranks


class Call(NamedTuple):
    """Of two ranks, with a bug in their code or without."""

    ranks: LocalRanks
    bug: Bug | None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function returns on each. Raises `Stopped` for an error."""
        answers = self.ranks.call(with_bug, self.bug or nullcontext, function, *arguments, timeout=240.0)
        errors = [answer.error for answer in answers if isinstance(answer, Ended)]
        if errors:
            raise Stopped(errors[0])
        return answers


def with_bug(bug: Bug, function: Callable[..., Any], *arguments: Any) -> Any:
    """Of a rank."""
    with bug():
        try:
            return function(*arguments)
        except Exception as error:
            return Ended(f"{type(error).__name__}: {error}")


# Claims: "" where they hold, else what is wrong


def trains(call: Call, _: Path, router: str, layout: Layout, *changes: str) -> str:
    """Two steps are those of one process."""
    return differs(alone(router, *changes), call(trained, config(router, "reference", *changes), layout, 2)[0])


@functools.cache
def alone(router: str, *changes: str) -> Trace:
    """The same steps in this process."""
    return trained(config(router, "reference", *changes), Layout(), 2)


def differs(one: Trace, many: Trace) -> str:
    """In what the steps of ranks are not those of one process."""
    row = compared(one, many)
    wrong = [name for name in ("loss", "gradients", "norm", "parameters") if not row[name] <= 1e-12]
    return ", ".join(wrong + ["counts"] * (not row["counts"]))


def computes_again(call: Call, _: Path) -> str:
    """So they are where activations are computed again, and every token's scores are the same for all experts."""
    cfg = config("softmax", "reference", "train.checkpoint_activations=true")
    return differs(_alike(cfg, Layout()), call(_alike, cfg, SHARDED)[0])


def _alike(cfg: Config, layout: Layout) -> Trace:
    with experts_alike():
        return trained(cfg, layout, 2)


@contextmanager
def experts_alike() -> Iterator[None]:
    """Models begin with routers whose weights are 0."""
    initialize = Transformer.initialize

    def zero(model: Transformer, seed: int) -> Transformer:
        initialize(model, seed)
        for router in model.routers():
            router.w_ED.detach().zero_()
        return model

    with patch.object(Transformer, "initialize", zero):
        yield


def repeats(call: Call, _: Path) -> str:
    """A rerun is the same to the bit. Of a token's four rows: a sum of two is the same in either order."""
    cfg = config("softmax", "reference", "model.moe.k=4")
    (first, *_), (again, *_) = (call(trained, cfg, EP, 2) for _ in range(2))
    return ", ".join(name for name, value in first.parameters.items() if not torch.equal(again.parameters[name], value))


def comes_back(call: Call, folder: Path) -> str:
    """What two ranks saved after a step, the weights and the optimiser's state, is what they and one process read."""
    cfg, path = config("softmax", "torch"), folder / checkpoint.name_of(1)
    saved, _ = call(_saved, cfg, folder)
    read = checkpoint.load(path)
    loaded, _ = call(_loaded, cfg, path)
    return ", ".join(
        name
        for name, value in saved.items()
        for other in (read.model | read.optimizer, loaded)
        if not torch.equal(other[name], value)
    )


def _model(cfg: Config, seed: int) -> Transformer:
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(seed)
    return parallelize.parallelize(model, build_meshes(EP, "cpu"), ParallelConfig(*EP))


def _saved(cfg: Config, folder: Path) -> dict[str, torch.Tensor]:
    model, ranks = _model(cfg, 3), this_rank()
    optimizer = build_optimizer(model, cfg.optim)
    step.compute_gradients(model, of_rank(batch_of(cfg, 0), ranks.rank, ranks.n, 1), cfg)
    optimizer.step()
    weights, state = model_tensors(model), optimizer_tensors(model, optimizer)
    sharded.save(folder, Snapshot(1, weights, state, {}, {"cpu": torch.get_rng_state()}), keep=1)
    return {name: whole(value).detach() for name, value in (weights | state).items()}


def _loaded(cfg: Config, path: Path) -> dict[str, torch.Tensor]:
    snapshot = load_onto(path, _model(cfg, 9))
    return {name: whole(value).detach() for name, value in {**snapshot.model, **snapshot.optimizer}.items()}


def ends(call: Call, _: Path, function: Callable[..., str]) -> str:
    """Transfers end, on both ranks: what a rank says is wrong, with less patience where they do not."""
    return next(filter(None, call(function, PATIENCE if call.bug else AT_EASE)), "")


def _one_has_no_rows(patience: float) -> str:
    """Of a rank: expert e, on the other rank for one of two, multiplies by 1 + e; rank 0 has no rows."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
    x = torch.arange(12.0).view(4, 3).requires_grad_()
    expert = torch.tensor([-1, -1, -1, -1] if rank() == 0 else [0, 1, 1, 0])

    def multiply(row: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return row * (1 + rank() + expert)[:, None]

    y = exchange.experts(x, torch.arange(4), expert, torch.ones(4), 2, multiply, group)
    y.sum().backward()
    right = (1.0 + expert)[:, None].expand(4, 3)
    return "" if torch.equal(y, x * right) and torch.equal(x.grad, right) else "values"


def _saves_aside(folder: Path, patience: float) -> str:
    """Of a rank: rank 0 is at a step's transfer already when it saves, and rank 1 comes to it when it has saved."""
    value, before = torch.ones(3), dist.group.WORLD
    dist.group.WORLD = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))  # what steps talk by
    try:
        with sharded.Saver() as saver:
            work = dist.all_reduce(value, async_op=True) if rank() == 0 else None
            saver.save(folder, Snapshot(1, {"w": torch.ones(3)}, {}, {}, {"cpu": torch.get_rng_state()}), keep=1)
            saver.wait()
            (work or dist.all_reduce(value, async_op=True)).wait()
    finally:
        dist.group.WORLD = before
    return "" if value.eq(2).all() else "values"


def saves_beside_a_step(call: Call, folder: Path) -> str:
    """A checkpoint is written aside while ranks are at different places of a step."""
    return ends(call, folder, partial(_saves_aside, folder))


def refuses(call: Call, _: Path) -> str:
    """Experts that ranks cannot have as many of each are refused on both."""
    cfg = config("softmax", "torch", "model.moe.n_experts=3")
    return next(filter(None, call(_accepted, cfg)), "")


def _accepted(cfg: Config) -> str:
    try:
        _model(cfg, 3)
    except BadInput as bad:
        return "" if "does not divide" in str(bad) else str(bad)
    return "accepted"


# Bugs


def expert_gradients_times_ranks() -> AbstractContextManager[Any]:
    here = ExpertWeights.here

    def more(weights: ExpertWeights) -> ExpertWeights:
        w_up_EFD, w_down_EDF, *rest = here(weights)
        n = n_ranks()
        return ExpertWeights(*(n * w - (n - 1) * w.detach() for w in (w_up_EFD, w_down_EDF)), *rest)

    return patch.object(ExpertWeights, "here", more)


def gradients_on_their_way_back_times_ranks() -> AbstractContextManager[Any]:
    backward = exchange.Sent.backward

    def more(ctx: Any, gradient: torch.Tensor) -> Any:
        return backward(ctx, gradient * n_ranks())

    return patch.object(exchange.Sent, "backward", staticmethod(more))


def means_of_gradients() -> AbstractContextManager[Any]:
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda module, factor: None)


def norm_without_experts() -> AbstractContextManager[Any]:
    return patch.object(step, "squared_norm", lambda grads: squared_norm([g for g in grads if not _of_experts(g)]))


def norm_of_copies() -> AbstractContextManager[Any]:
    return patch.object(gradients, "copies", lambda tensor: 1)


def norm_as_torch_has_it() -> AbstractContextManager[Any]:
    return patch.object(step, "squared_norm", lambda grads: torch.nn.utils.get_total_norm(grads).square())


def _of_experts(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh") and "ep" in tensor.device_mesh.mesh_dim_names


def written(part: Callable[[torch.Tensor], torch.Tensor], of: str = "") -> AbstractContextManager[Any]:
    """Of experts, in tensors whose names begin so, a part is written instead."""
    write = shards.write

    def less(folder: Path, tensors: dict[str, torch.Tensor], group: Any = None) -> None:
        write(folder, {k: part(v) if _of_experts(v) and k.startswith(of) else v for k, v in tensors.items()}, group)

    return patch.object(shards, "write", less)


def _ours(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor.detach()).clone()


def _ours_for_all(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([_ours(tensor)] * n_ranks())


def rank_0_tells_what_it_read() -> AbstractContextManager[Any]:
    read_into = shards.read_into

    def overwritten(folder: Path, tensors: dict[str, torch.Tensor], alone: bool = False) -> None:
        read_into(folder, tensors, alone)
        for tensor in tensors.values():
            if _of_experts(tensor):
                dist.broadcast(local(tensor.detach()), 0)

    return patch.object(shards, "read_into", overwritten)


def the_same_experts_on_every_rank() -> AbstractContextManager[Any]:
    return patch.object(Meshes, "expert_rank", lambda meshes: 0)


def weights_drawn_by_rank() -> AbstractContextManager[Any]:
    initialize = Transformer.initialize
    return patch.object(Transformer, "initialize", lambda model, seed: initialize(model, seed + rank()))


def noise_drawn_by_rank() -> AbstractContextManager[Any]:
    return patch.object(Ranks, "drawn", lambda ranks, draw, like: draw(like))


@contextmanager
def counts_in_a_buffer() -> Iterator[None]:
    """A layer adds to it when it has routed, and a step reads and empties it when it is over. (What comes behind the
    last tensor that a backward pass needs is not computed again.)"""
    limited, send, layer_totals = MoELayer.limited, MoELayer.send, step.layer_totals

    def counted(layer: MoELayer, *arguments: Any) -> Any:
        routing = limited(layer, *arguments)
        if not hasattr(layer, "buffer_E"):
            layer.buffer_E = torch.zeros(layer.n_experts, dtype=torch.int64)
        layer.buffer_E += reference.count(routing.expert.flatten(), layer.n_experts)
        return routing

    def kept(layer: MoELayer, *arguments: Any) -> Any:
        y, report = send(layer, *arguments)
        return y, report._replace(count_E=layer.buffer_E)

    def emptied(routing: Any, *arguments: Any) -> Any:
        totals = layer_totals(routing, *arguments)
        totals.count_E = totals.count_E.clone()
        routing.count_E.zero_()
        return totals

    with (
        patch.object(MoELayer, "limited", counted),
        patch.object(MoELayer, "send", kept),
        patch.object(step, "layer_totals", emptied),
    ):
        yield


@contextmanager
def bias_by_micro_batch() -> Iterator[None]:
    """Of all ranks' counts, but of one micro-batch, before the next."""
    read = step.read

    def learns(model: Transformer, tokens: Any, targets: Any, cfg: Config, **rest: Any) -> Any:
        output, reward = read(model, tokens, targets, cfg, **rest)
        for router, layer in zip(model.routers(), output.routing, strict=True):
            router.update(cfg.balance, cfg.balance.bias_rate, this_rank().summed(layer.wanted_E), layer.observed)
        return output, reward

    with patch.object(step, "read", learns), patch.object(equalities, "update_routers", lambda *arguments: None):
        yield


def bias_by_rank() -> AbstractContextManager[Any]:
    over_ranks = step.LayerTotals.over_ranks

    def alone(totals: step.LayerTotals, summed: Any) -> None:
        wanted_E = totals.wanted_E
        over_ranks(totals, summed)
        totals.wanted_E = wanted_E

    return patch.object(step.LayerTotals, "over_ranks", alone)


_calls = itertools.count()


def rows_added_as_they_come() -> AbstractContextManager[Any]:
    """In an order that is another in every call, as that of atomics is."""

    def added(row_ND: Any, order_N: Any, token_N: Any, weight_N: Any, n_tokens: int) -> torch.Tensor:
        row_ND = row_ND[order_N] if weight_N is None else row_ND[order_N] * weight_N[:, None]
        chance_N = torch.randperm(len(row_ND), generator=torch.Generator().manual_seed(next(_calls)))
        return row_ND.new_zeros(n_tokens, row_ND.shape[1]).index_add(0, token_N[chance_N], row_ND[chance_N])

    return patch.object(exchange, "_by_token", added)


def equals_in_another_order_when_computed_again() -> AbstractContextManager[Any]:
    largest = reference._largest

    def last(rank_TE: torch.Tensor, k: int, outside_TE: torch.Tensor | None = None) -> torch.Tensor:
        if torch._C._current_graph_task_id() == -1:  # no backward pass is on its way
            return largest(rank_TE, k, outside_TE)
        return len(rank_TE[0]) - 1 - largest(rank_TE.flip(-1), k, outside_TE)

    return patch.object(reference, "_largest", last)


def no_rows_no_transfer() -> AbstractContextManager[Any]:
    experts = exchange.experts

    def unless_none(x_TD: torch.Tensor, token_N: Any, expert_N: torch.Tensor, *rest: Any) -> torch.Tensor:
        return experts(x_TD, token_N, expert_N, *rest) if (expert_N >= 0).any() else 0 * x_TD

    return patch.object(exchange, "experts", unless_none)


def uneven_experts() -> AbstractContextManager[Any]:
    return patch.object(parallelize, "check_experts", lambda *arguments: None)


def saving_by_the_group_of_steps() -> AbstractContextManager[Any]:
    init = sharded.Saver.__init__

    def without(saver: sharded.Saver) -> None:
        init(saver)
        saver.group = dist.group.WORLD

    return patch.object(sharded.Saver, "__init__", without)


@contextmanager
def the_whole_batch_on_every_rank() -> Iterator[None]:
    def everything(batch_size: int, *sizes: int) -> list[int]:
        return list(range(batch_size))

    with (
        patch.object(moe.data.loader, "rows_of_rank", everything),
        patch.object(equalities, "rows_of_rank", everything),
    ):
        yield


class Trap(NamedTuple):
    bug: Bug
    claim: Callable[..., str]
    arguments: tuple[Any, ...]
    sign: str  # a pattern in what the claim says is wrong, or in the error that ranks end with


SOFTMAX = ("softmax", EP)
COMPUTED_AGAIN = (*SOFTMAX, "train.checkpoint_activations=true")
HANGS = "timed? ?out|connection closed"  # which of them a rank says first is chance
BIASED = ("sigmoid-bias", EP)
TRAPS = {
    # Gradients and their norm
    "gradients of experts are as many times too large as ranks share them out":
        Trap(expert_gradients_times_ranks, trains, SOFTMAX, "gradients"),
    "what comes back from experts to the layers before is as many times too large":
        Trap(gradients_on_their_way_back_times_ranks, trains, SOFTMAX, "gradients"),
    "gradients are means over ranks": Trap(means_of_gradients, trains, ("softmax", SHARDED), "gradients"),
    "gradients are means on one mesh and sums on the other, which is of one rank":
        Trap(means_of_gradients, trains, SOFTMAX, "gradients"),
    "the norm is of one mesh": Trap(norm_without_experts, trains, SOFTMAX, "norm"),
    "the norm stacks tensors of two meshes": Trap(norm_as_torch_has_it, trains, SOFTMAX, "aten.stack"),
    "the norm counts every copy": Trap(norm_of_copies, trains, ("softmax", COPIES), "norm"),
    # Checkpoints
    "a checkpoint keeps one rank's experts": Trap(partial(written, _ours), comes_back, (), r"has shape \(4, "),
    "a checkpoint keeps one rank's experts of the optimiser alone":
        Trap(partial(written, _ours, "exp_avg"), comes_back, (), "exp_avg"),
    "a checkpoint has one rank's experts in the shape of all, and loads without a word":
        Trap(partial(written, _ours_for_all), comes_back, (), "w_up_EFD"),
    "what rank 0 has read overwrites the others' experts":
        Trap(rank_0_tells_what_it_read, comes_back, (), "w_up_EFD"),
    # What is drawn
    "every rank's experts are the same": Trap(the_same_experts_on_every_rank, trains, SOFTMAX, "parameters"),
    "copies of the model begin differently": Trap(weights_drawn_by_rank, trains, ("softmax", COPIES), "gradients"),
    "the router's noise is the rank's, not the token's": Trap(noise_drawn_by_rank, trains, ("noisy", EP), "loss"),
    # What is counted
    "counts are doubled where activations are computed again":
        Trap(counts_in_a_buffer, trains, COMPUTED_AGAIN, "counts"),
    "the selection bias moves with every micro-batch":
        Trap(bias_by_micro_batch, trains, (*BIASED, "train.accumulate=2"), "parameters"),
    "the selection bias is every rank's own": Trap(bias_by_rank, trains, BIASED, "parameters"),
    "every rank reads the whole batch": Trap(the_whole_batch_on_every_rank, trains, SOFTMAX, "counts"),
    # Orders
    "a token's rows are added as they come": Trap(rows_added_as_they_come, repeats, (), "experts"),
    "equal scores have another order when they are computed again":
        Trap(equals_in_another_order_when_computed_again, computes_again, (), "CheckpointError"),
    # Experts that ranks cannot share, and last what makes transfers hang
    "experts that do not divide are accepted": Trap(uneven_experts, refuses, (), "accepted"),
    "a rank without rows takes no part": Trap(no_rows_no_transfer, ends, (_one_has_no_rows,), HANGS),
    "saving aside talks by the group of steps": Trap(saving_by_the_group_of_steps, saves_beside_a_step, (), HANGS),
}  # fmt: skip
_held: set[Any] = set()  # claims that held without a bug


@pytest.mark.parametrize("name", TRAPS)
def test_a_claim_that_holds_fails_with_the_trap_put_back(name, ranks, tmp_path):
    bug, claim, arguments, sign = TRAPS[name]
    if (claim, arguments) not in _held:
        assert claim(Call(ranks, None), tmp_path / "right", *arguments) == ""
        _held.add((claim, arguments))
    try:
        wrong = claim(Call(ranks, bug), tmp_path / "wrong", *arguments)
    except Stopped as stopped:
        wrong = str(stopped)
    assert re.search(sign, wrong, re.IGNORECASE)
