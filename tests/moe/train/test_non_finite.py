"""Claims about NaN and infinity: wherever one arises, no parameter takes it on, and the message says where it was."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

import moe.train.loop
import moe.train.non_finite
import moe.train.step
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint
from moe.run.jsonl import read_lines
from moe.train.optimizer import optimizer_tensors
from tests.small_runs import SAVED, STEPS, fate, settings, silent, tensors_digest, train

BAD = 5  # the step at which something is not finite; the last checkpoint is of step 3


def poison_parameter(name, state, patch):
    with torch.no_grad():
        state.model.get_parameter(name).view(-1)[3] = math.nan


def poison_output(name, state, patch):
    state.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * math.inf)


def poison_router(field, state, patch):
    def hook(module, inputs, output):
        return output._replace(**{field: getattr(output, field) * math.nan})

    state.model.get_submodule("blocks.1.mlp.router").register_forward_hook(hook)


def poison_loss(state, patch):
    """With gradients that are finite all the same."""
    loss = moe.train.step.next_token_loss
    patch.setattr(moe.train.step, "next_token_loss", lambda *arguments: loss(*arguments) + math.inf)


def poison_gradient(name, state, patch):
    state.model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, -math.inf))


PLACES: dict[str, tuple[Callable, str]] = {
    "a parameter": (partial(poison_parameter, "blocks.1.attn.o.weight"), "the parameter blocks.1.attn.o.weight"),
    "an embedding": (partial(poison_parameter, "embed.weight"), "the parameter embed.weight"),
    "an activation": (partial(poison_output, "blocks.0.attn"), "the output of blocks.0.attn"),
    "router logits": (partial(poison_router, "lse_T"), "the output of blocks.1.mlp.router"),
    "router weights": (partial(poison_router, "weight"), "the output of blocks.1.mlp.router"),
    "the loss": (poison_loss, "the loss"),
    "a gradient": (partial(poison_gradient, "blocks.0.mlp.experts.w_up_EFD"), "blocks.0.mlp.experts.w_up_EFD"),
}


@pytest.fixture
def poison(monkeypatch):
    """(poisoner, steps) -> a dict that gets, for each poisoned step, digests of the state before and after it."""

    def arrange(poisoner, *steps):
        take_step, seen = moe.train.step.take_step, {}

        def digest(state):
            tensors = checkpoint_tensors(state)
            return {key: tensors_digest({key: value}) for key, value in tensors.items()}

        def take(state, *arguments):
            step = state.step + 1
            if step not in steps:
                return take_step(state, *arguments)
            with pytest.MonkeyPatch.context() as patch:
                poisoner(state, patch)
                before = digest(state)
                try:
                    return take_step(state, *arguments)
                finally:
                    seen[step] = before, digest(state)
                    for module in state.model.modules():
                        module._forward_hooks.clear()
                    for p in state.model.parameters():
                        p._backward_hooks = None

        monkeypatch.setattr(moe.train.loop, "take_step", take)
        return seen

    return arrange


def checkpoint_tensors(state):
    return model_tensors(state.model) | optimizer_tensors(state.model, state.optimizer)


BIAS = {"router.name": "sigmoid", "router.selection_bias": True, "balance.bias_rate": 0.01}


@pytest.mark.parametrize("place", PLACES)
def test_a_stop_names_step_place_and_last_good_checkpoint_and_poisons_nothing(place, poison, corpus, tmp_path):
    poisoner, named = PLACES[place]
    seen = poison(poisoner, BAD)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run", BIAS))
    message = str(caught.value)
    good = tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}"
    assert message.startswith(f"step {BAD}: ")
    assert f"{named} is not finite" in message
    assert f"the last good checkpoint is {good}" in message
    assert message.count("\n") == 0

    before, after = seen[BAD]
    assert after == before
    snapshot = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail))
    assert snapshot.step == SAVED
    assert all(t.isfinite().all() for t in (*snapshot.model.values(), *snapshot.optimizer.values()))
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == BAD - 1


def test_before_the_first_checkpoint_the_message_says_that_there_is_none(poison, corpus, tmp_path):
    poison(poison_loss, 1)
    with pytest.raises(BadInput, match=r"^step 1: the loss is not finite; .* no checkpoint was written yet"):
        train(settings(corpus, tmp_path / "run"))


def test_a_stopped_run_goes_on_from_its_last_good_checkpoint(poison, corpus, tmp_path, monkeypatch):
    train(settings(corpus, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        take_step = moe.train.step.take_step
        poison(poison_loss, BAD)
        with pytest.raises(BadInput):
            train(settings(corpus, tmp_path / "run"))
        patch.setattr(moe.train.loop, "take_step", take_step)
        train(settings(corpus, tmp_path / "run", {"resume": True}))
    assert fate(tmp_path / "run") == fate(tmp_path / "whole")


def poison_update(state, patch):
    """The optimiser's step leaves an infinity behind, as a learning rate that is far too high may."""
    step = state.optimizer.step

    def overshoot():
        step()
        with torch.no_grad():
            state.model.norm.weight[0] = math.inf

    patch.setattr(state.optimizer, "step", overshoot)


@pytest.mark.parametrize("step", [BAD, 2 * SAVED])
def test_what_an_update_ruined_is_never_saved(step, poison, corpus, tmp_path):
    """At a step with a checkpoint the save refuses; at another one the next step does."""
    poison(poison_update, step)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run", {"train.eval_every": 0}))
    assert "the parameter norm.weight is not finite" in str(caught.value)
    assert f"checkpoint is {tmp_path / 'run' / 'checkpoints' / f'step-{SAVED:08d}'}" in str(caught.value)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == [f"step-{SAVED:08d}"]


@pytest.mark.parametrize("place", ["an activation", "router logits", "the loss", "a gradient"])
def test_a_skipped_step_is_counted_and_not_taken(place, poison, corpus, tmp_path):
    seen = poison(PLACES[place][0], 2, BAD)
    summary = train(settings(corpus, tmp_path / "run", BIAS | {"train.non_finite": "skip"}))
    for before, after in seen.values():
        assert after == before
    assert sorted(seen) == [2, BAD]
    assert summary.skipped == 2
    assert summary.steps == STEPS
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines[1:]] == [0, 1, 1, 1, 2, 2, 2]
    null = [None in (line["loss"], line["grad_norm"]) for line in lines[1:]]
    assert null == [False, True, False, False, True, False, False]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # strict JSON readers refuse it
    snapshot = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints", silent))
    taken = {value.item() for key, value in snapshot.optimizer.items() if key.startswith("step/")}
    assert taken == {STEPS - 2}


@pytest.fixture
def diverged_validation(monkeypatch):
    """(steps) -> the validation after each of them meets an activation that is not finite; training does not."""

    def arrange(*steps):
        evaluated = moe.train.loop.validate

        def validate(state, *arguments):
            hook = state.model.blocks[1].attn.register_forward_hook(
                lambda module, inputs, output: output * math.nan if state.step in steps else output
            )
            try:
                return evaluated(state, *arguments)
            finally:
                hook.remove()

        monkeypatch.setattr(moe.train.loop, "validate", validate)

    return arrange


def test_a_validation_that_is_not_finite_stops_with_the_sentence_of_a_step(diverged_validation, corpus, tmp_path):
    diverged_validation(BAD)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run", {"train.eval_every": 1}))
    good = tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}"
    assert re.fullmatch(
        rf"step {BAD}: the output of blocks\.1\.attn is not finite in 8 of the 8 windows of the validation and the "
        rf"last good checkpoint is {re.escape(str(good))}: lower optim\.lr=\S+ or raise optim\.warmup=2, or set "
        r"train\.non_finite=skip to record it as null and go on\.",
        str(caught.value),
    )
    assert checkpoint.load(good).step == SAVED


def test_a_skipped_validation_is_null_and_its_checkpoint_is_never_the_best(diverged_validation, corpus, tmp_path):
    """The checkpoints are of steps 3, 6 and 7; those of 6 and 7 have no score."""
    diverged_validation(2 * SAVED, STEPS)
    summary = train(settings(corpus, tmp_path / "run", {"train.eval_every": 1, "train.non_finite": "skip"}))
    assert math.isnan(summary.val.loss)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["val"]["loss"] is None] == [2 * SAVED, STEPS]
    assert lines[-1]["val"]["domains"]["chess"]["bpb"] is None
    assert "NaN" not in (tmp_path / "run" / "summary.json").read_text()
    assert checkpoint.best(tmp_path / "run" / "checkpoints").name == f"step-{SAVED:08d}"


def test_too_many_skipped_steps_in_a_row_stop_the_run(poison, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(moe.train.step, "MAX_SKIPPED", 2)
    poison(poison_loss, 1, 2, 4, 5, 6)
    with pytest.raises(BadInput, match=r"^step 6: the loss is not finite"):
        train(settings(corpus, tmp_path / "run", {"train.non_finite": "skip"}))


def test_a_compiled_model_is_looked_into_all_the_same(poison, corpus, tmp_path, monkeypatch):
    compile_module = Transformer.compile
    monkeypatch.setattr(Transformer, "compile", lambda self: compile_module(self, backend="eager"))
    poison(partial(poison_parameter, "norm.weight"), BAD)
    explain, first = moe.train.non_finite.explain_non_finite, []
    monkeypatch.setattr(moe.train.step, "explain_non_finite", lambda *a: first.append(a) or explain(*a))
    with pytest.raises(BadInput):
        train(settings(corpus, tmp_path / "run", {"train.compile": True}))
    state, batch, loss, cfg, _ = first[0]
    with torch.no_grad():  # a parameter that is finite, and makes an activation overflow
        state.model.norm.weight.fill_(1.0)
        state.model.blocks[0].attn.o.weight.fill_(3e38)
    assert re.fullmatch(
        r"the output of blocks\.0\.attn.*", moe.train.non_finite.first_non_finite(state.model, batch, loss, cfg)
    )
