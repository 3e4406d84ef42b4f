"""Claims about whole runs of several ranks: files, logs, checkpoints and evaluations are those of one process, any
number goes on with what any other began, and what cannot be shared is refused in one sentence on all of them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import moe.train.loop
from moe.errors import BadInput
from moe.eval.evaluate import causal_leak
from moe.parallel.collectives import rank
from moe.run import checkpoint
from moe.run.jsonl import read_lines
from moe.run.load import load_run
from moe.run.summary import read_summary
from tests.ranks import run_ranks
from tests.small_runs import SAVED, settings, train, train_until

NUMBERS = ("loss", "lm_loss", "grad_norm")


def _train(cfg, until: int = 0):
    """Of one rank: its summary, or the sentence it ends with."""
    said: list[str] = []
    if until:
        return train_until(cfg, until)
    try:
        return train(cfg, said.append), said
    except BadInput as bad:
        return str(bad)


def of_ranks(n: int, cfg, until: int = 0) -> list[Any]:
    return run_ranks(n, _train, cfg, until) if n > 1 else [_train(cfg, until)]


def close(one: Any, other: Any) -> bool:
    """Alike but for rounding, all through lists and dicts."""
    match one:
        case dict():
            return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
        case list():
            return len(one) == len(other) and all(map(close, one, other))
        case float():
            return math.isclose(one, other, rel_tol=2e-4, abs_tol=1e-5)
    return one == other


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in lines]


CHANGES = {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.01, "log.experts": True}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(settings(corpus, folder, CHANGES))
    return folder


@pytest.mark.parametrize(
    ("n", "parallel"),
    [(2, {}), (2, {"parallel.shard": 1}), (2, {"parallel.ep": 2}), (4, {"parallel.replicate": 2, "parallel.ep": 2})],
    ids=str,
)
def test_a_run_of_ranks_leaves_what_a_run_of_one_process_leaves(n, parallel, alone, corpus, tmp_path):
    run = tmp_path / "run"
    answers = of_ranks(n, settings(corpus, run, CHANGES | parallel))
    assert all(summary == read_summary(run) for summary, _ in answers)
    assert [bool(said) for _, said in answers] == [True] + [False] * (n - 1)  # rank 0 speaks
    # The log: of every step the numbers of one process, counts to the row.
    ours, theirs = (without_times(read_lines(folder / "metrics.jsonl")) for folder in (run, alone))
    assert close(theirs, ours)
    counts = [read_lines(folder / "routing" / "counts.jsonl") for folder in (run, alone)]
    assert [line["counts"] for line in counts[0]] == [line["counts"] for line in counts[1]]
    # Every token's experts, in the order of the batch.
    chosen = [sorted((folder / "routing").rglob("*.npy")) for folder in (run, alone)]
    assert len(chosen[1]) == 2
    assert [path.read_bytes() for path in chosen[0]] == [path.read_bytes() for path in chosen[1]]
    # The evaluation, window by window, and the loads of experts by domain.
    ours, theirs = (read_summary(folder) for folder in (run, alone))
    assert close(dataclasses.asdict(theirs.val), dataclasses.asdict(ours.val))
    assert close(theirs.val_windows, ours.val_windows)
    assert theirs.load.counts == ours.load.counts
    assert (ours.tokens, ours.steps, ours.params) == (theirs.tokens, theirs.steps, theirs.params)
    # The checkpoints: as many, and every tensor of the model and of the optimiser.
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, alone)]
    assert names[0] == names[1]
    ours, theirs = (checkpoint.load(checkpoint.latest(folder / "checkpoints", print)) for folder in (run, alone))
    for of_ranks_, of_one in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert of_ranks_.keys() == of_one.keys()
        for name, value in of_one.items():
            torch.testing.assert_close(of_ranks_[name], value, rtol=1e-2, atol=1e-4, msg=name)
    assert torch.equal(ours.rng["cpu"], theirs.rng["cpu"])
    # And what reads a run reads this one.
    model, _, _ = load_run(run, "last")
    assert causal_leak(model, torch.randint(0, 250, (1, 16))) < 1e-10


@pytest.mark.parametrize(
    "goes_on", [(1, {}), (2, {"parallel.ep": 2}), (4, {"parallel.replicate": 2, "parallel.ep": 2})]
)
@pytest.mark.parametrize("began", [(1, {}), (2, {"parallel.shard": 1}), (4, {"parallel.ep": 4})])
def test_any_number_of_ranks_goes_on_with_what_any_other_began(began, goes_on, alone, corpus, tmp_path):
    run = tmp_path / "run"
    if began[0] == 1:
        train_until(settings(corpus, run, CHANGES | began[1]), 5)
    else:
        of_ranks(began[0], settings(corpus, run, CHANGES | began[1]), 5)
    assert len(read_lines(run / "metrics.jsonl")) == 5
    of_ranks(goes_on[0], settings(corpus, run, CHANGES | goes_on[1] | {"resume": True}))
    ours, theirs = (without_times(read_lines(folder / "metrics.jsonl")) for folder in (run, alone))
    assert close(theirs, ours)


@pytest.mark.parametrize("lost", ["optimizer", "rng", "loader", "model"])
def test_two_ranks_resumed_are_two_ranks_uninterrupted_to_the_bit_and_nothing_less_would_do(corpus, tmp_path, lost):
    changes = {"router.noisy": True, "parallel.ep": 2}
    of_ranks(2, settings(corpus, tmp_path / "whole", changes))
    of_ranks(2, settings(corpus, tmp_path / "run", changes), 5)
    run_ranks(2, _lose, "")
    of_ranks(2, settings(corpus, tmp_path / "run", changes | {"resume": True}))
    of_ranks(2, settings(corpus, tmp_path / "less", changes), 5)
    run_ranks(2, _lose, lost)
    try:
        of_ranks(2, settings(corpus, tmp_path / "less", changes | {"resume": True}))
    finally:
        run_ranks(2, _lose, "")
    whole, run, less = (
        checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints", print)) for name in ("whole", "run", "less")
    )
    assert all(torch.equal(run.model[name], value) for name, value in whole.model.items())
    assert all(torch.equal(run.optimizer[name], value) for name, value in whole.optimizer.items())
    assert not all(torch.equal(less.model[name], value) for name, value in whole.model.items())


_kept: dict[str, Any] = {}


def _lose(what: str) -> None:
    """Of a rank: do not put back one part of a state from here on; "" for all of it again."""
    state = moe.train.state
    _kept.setdefault("put_back", state._put_back)
    _kept.setdefault("load_onto", state.load_onto)
    state._put_back, state.load_onto = _kept["put_back"], _kept["load_onto"]

    def put_back(of: Any, snapshot: Any) -> None:
        if what == "optimizer":
            snapshot = dataclasses.replace(snapshot, optimizer={})
        if what == "rng":
            snapshot = dataclasses.replace(snapshot, rng={"cpu": torch.Generator().manual_seed(99).get_state()})
        _kept["put_back"](of, snapshot)
        if what == "loader":
            of.loader.batch_rows = list(reversed(of.loader.batch_rows))[:1] * len(of.loader.batch_rows)

    def load_onto(path: Path, model: Any) -> Any:
        snapshot = _kept["load_onto"](path, model)
        if what == "model":
            next(model.parameters()).detach().mul_(1.001)
        return snapshot

    if what:
        state._put_back, state.load_onto = put_back, load_onto


def _different(corpus, run):
    return _train(settings(corpus, run, {"optim.lr": 0.001 * (1 + rank())}))


def test_ranks_with_other_settings_are_refused_before_there_is_a_folder(corpus, tmp_path):
    ours, theirs = run_ranks(2, _different, corpus, tmp_path / "run")
    assert ours == theirs
    assert "has optim.lr 0.002, and rank 0 0.001: all ranks must have the same" in ours
    assert not (tmp_path / "run").exists()


REFUSED = {
    "train.batch_size=3 in train.accumulate=1 micro-batches cannot be shared evenly": {"train.batch_size": 3},
    "parallel.shard=3 does not divide the 2 ranks: accepted are 1, 2": {"parallel.shard": 3},
    "parallel.ep=3 does not divide parallel.shard=2": {"parallel.ep": 3},
    "parallel.ep=2 does not divide model.moe.n_experts=3": {"parallel.ep": 2, "model.moe.n_experts": 3},
    "balance.tile=8 is for one process: with 2 ranks accepted is 0": {"balance.tile": 8},
    "tune.rank=2 is for one process": {"tune.rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_ranks_cannot_share_is_one_sentence_on_all_of_them_and_leaves_nothing(sentence, corpus, tmp_path):
    ours, theirs = of_ranks(2, settings(corpus, tmp_path / "run", REFUSED[sentence]))
    assert ours == theirs
    assert ours.startswith(sentence)
    assert not (tmp_path / "run").exists()


def _one_nan(cfg, step):
    """Of a rank: rank 1 sees a weight that is not a number at one step."""
    take_step = moe.train.loop.take_step

    def take(state: Any, *arguments: Any) -> Any:
        if state.step + 1 == step and rank() == 1:
            next(state.model.parameters()).to_local().detach()[0] = math.nan
        return take_step(state, *arguments)

    moe.train.loop.take_step = take
    try:
        return _train(cfg)
    finally:
        moe.train.loop.take_step = take_step


def test_a_number_that_is_not_finite_on_one_rank_stops_all_at_that_step(corpus, tmp_path):
    ours, theirs = run_ranks(2, _one_nan, settings(corpus, tmp_path / "run"), SAVED + 1)
    assert ours == theirs
    assert ours.startswith(f"step {SAVED + 1}: the parameter embed.weight is not finite")
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(SAVED + 1))


def test_half_the_bytes_of_weights_and_gradients_train_to_about_the_same(alone, corpus, tmp_path):
    changes = CHANGES | {"parallel.weights": "bf16", "parallel.gradients": "bf16", "parallel.ep": 2}
    of_ranks(2, settings(corpus, tmp_path / "run", changes))
    ours, theirs = (read_summary(folder).val.loss for folder in (tmp_path / "run", alone))
    assert ours != theirs
    assert abs(ours / theirs - 1) < 0.01
    kept = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", print))
    assert {value.dtype for name, value in kept.model.items() if name.endswith("weight")} == {torch.float32}


def test_saving_aside_leaves_the_same_checkpoints(corpus, tmp_path):
    for name, aside in (("run", True), ("now", False)):
        of_ranks(2, settings(corpus, tmp_path / name, {"checkpoint.aside": aside, "parallel.ep": 2}))
    ours, theirs = (tmp_path / name / "checkpoints" for name in ("run", "now"))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in ours.iterdir():
        one, other = checkpoint.load(path), checkpoint.load(theirs / path.name)
        assert all(torch.equal(one.model[name], value) for name, value in other.model.items())
        assert all(torch.equal(one.optimizer[name], value) for name, value in other.optimizer.items())
