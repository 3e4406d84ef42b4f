"""What a step minimises besides the text's loss: rewards of pairs, DPO, and GRPO on answers that the model draws.

`prepare_objective` has what an objective needs beside the model: the source as its reference, a judge, the tokenizer.
`draw_answers` makes a step's batch of GRPO, a pure function of the weights, the seed and the step, so that a run is
resumed bitwise. `answer_loss` is a micro-batch's loss, and what a step says of its answers (`MetricsLine.answers`):

reward       mean reward (grpo), or of a pair's preferred less its rejected answer (reward: "margin")
exact, gap   share of answers that are exactly right, and reward less that: where it grows, the reward is being hacked
length       tokens of an answer
kl           nats of an answer by which the model has left its source, KL(model || source), estimated
flat         share of groups whose answers all got the same
accuracy     share of pairs whose preferred answer the model prefers, over the source (dpo)
flips        share of choices of experts that are other than those the answers were drawn by (grpo), or the source's
             (dpo); over real tokens and all MoE layers
ratio        the largest |ln(model / drawn by)| of a token; far: share of the tokens beyond the clip's limits

Padding is routed, as it has a place in the batch, and counts in the loads of a step; no loss of answers sees it. The
balance's losses do where they are not 0, which they are unless asked for (`balance=none`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.analysis.decisions import flipped
from moe.config.router import facts
from moe.config.run import Config
from moe.data.answer_loader import Prompts
from moe.data.loader import NO_TARGET, Batch
from moe.data.tasks import REWARDS, exact
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.evaluate import eval_mode
from moe.eval.rollout import Rollout, judged, last_place, rollout
from moe.model.adapt import merged
from moe.model.layer import LayerRouting
from moe.model.transformer import Output, Transformer, divided, load_model
from moe.run.load import load_run, load_source
from moe.run.machine import autocast
from moe.train.grpo import advantages, clipped_loss, kl_estimate, token_weights
from moe.train.preference import answer_log_probs, dpo_loss, reward_loss, token_log_probs


@dataclass
class Companions:
    """What an objective needs beside the model that it trains; both in eval mode and without gradients."""

    tokenizer: Tokenizer
    reference: Transformer | None = None  # the source
    judge: Transformer | None = None  # of objective.reward=model


@dataclass
class Drawn(Batch):
    """A step's drawn answers, and how each is to be learnt from."""

    old_BS: Tensor  # log-probabilities that the targets were drawn with; 0 where there is none
    advantage_B: Tensor
    weight_BS: Tensor
    experts_LBSK: Tensor | None  # that they were drawn by
    figures: dict[str, float]


def prepare_objective(
    cfg: Config, tokenizer: Tokenizer, document_end: int | None, device: torch.device
) -> Companions | None:
    """None for objective.name=lm. Raises `BadInput` for a source or a judge with another tokenizer or of another model,
    and a judge that is no reward model."""
    if cfg.objective.name == "lm":
        return None
    reference = load_reference(cfg, tokenizer, document_end, device) if cfg.objective.name != "reward" else None
    judge = load_judge(cfg, tokenizer, device) if cfg.objective.judge else None
    return Companions(tokenizer, reference, judge)


def load_reference(cfg: Config, tokenizer: Tokenizer, document_end: int | None, device: torch.device) -> Transformer:
    """The model that the run starts from, as it was. Raises `BadInput` for one that does not fit."""
    snapshot = load_source(cfg.source, tokenizer.fingerprint)
    reference = Transformer(cfg.model, cfg.router, cfg.balance, document_end)
    weights = merged(snapshot.model)
    try:
        load_model(reference, {name: value for name, value in weights.items() if name != "reward.weight"})
    except BadInput as error:
        raise BadInput(f"source={cfg.source} does not fit this run: {error}") from error
    return reference.to(device).eval().requires_grad_(False)


def load_judge(cfg: Config, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The reward model of `cfg.objective.judge`. Raises `BadInput` for a run that is none, or reads other ids."""
    folder = Path(cfg.objective.judge)
    judge, its_tokenizer, its = load_run(folder, "last", cfg.trust or cfg.router.name)
    if judge.reward is None:
        raise BadInput(
            f"objective.judge={folder} has objective.name={its.objective.name}: accepted is a run with "
            "objective.name=reward, which gives answers a number."
        )
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise BadInput(
            f"objective.judge={folder} has another tokenizer ({its_tokenizer.fingerprint[:12]}) than this run "
            f"({tokenizer.fingerprint[:12]}): the two must read the same ids."
        )
    if judge.cfg.context < cfg.model.context:
        raise BadInput(f"objective.judge={folder} has model.context={judge.cfg.context}, and this run more.")
    return judge.to(device).requires_grad_(False)


# ---------------------------------------------------------------- drawing


def draw_answers(model: Transformer, prompts: Prompts, companions: Companions, cfg: Config, step: int) -> Drawn:
    """A step's answers (`step` from 1), objective.group to each prompt, with what they are worth.

    Raises `BadInput` for a reward that is not finite, and where at the first step all answers get the same."""
    objective, tokenizer = cfg.objective, companions.tokenizer
    rows = [ids for ids in prompts.prompts for _ in range(objective.group)]
    right = [answer for answer in prompts.answers for _ in range(objective.group)]
    seeds = np.random.SeedSequence([cfg.seed, step]).generate_state(len(rows), np.uint64) >> 1
    with eval_mode(model), drawing_precision(cfg):
        answers = rollout(
            model, rows, objective.max_new, seeds=seeds.tolist(), stop=[tokenizer.eot], pad=tokenizer.eot,
            temperature=objective.temperature, backend=drawing_backend(cfg), record=records(cfg),
        )  # fmt: skip

    # What they are worth.
    said = zip(answers.answers(), answers.stopped_B.tolist(), strict=True)
    texts = [tokenizer.decode(ids[: len(ids) - stopped]) for ids, stopped in said]
    reward_B = rewards_of(answers, texts, right, companions, cfg)
    learnt = advantages(reward_B, objective.group, objective.normalize)
    if step == 1 and (reward_B == reward_B[0]).all():
        raise BadInput(
            f"objective.reward={objective.reward} gives {reward_B[0]:g} to each of the {len(rows)} answers of the "
            "first step, and nothing can be learnt from that: start from a source that is right now and then, or raise "
            "train.batch_size."
        )
    answer_BS = answers.answer_BS1[:, 1:]
    exactly = [exact(*row) for row in zip(texts, right, answers.stopped_B.tolist(), strict=True)]
    figures = {
        "reward": reward_B.mean().item(),
        "exact": sum(exactly) / len(exactly),
        "gap": reward_B.mean().item() - sum(exactly) / len(exactly),
        "length": answer_BS.sum().item() / len(rows),
        "flat": learnt.flat * objective.group / len(rows),
    }
    targets_BS = torch.where(answer_BS, answers.tokens_BS1[:, 1:], NO_TARGET)
    return Drawn(
        answers.tokens_BS1[:, :-1], targets_BS, torch.zeros(targets_BS.shape, dtype=torch.uint8),
        answers.log_prob_BS1[:, 1:], learnt.advantage_B.float(),
        token_weights(answer_BS, objective.normalize, objective.max_new), answers.experts_LBSK, figures,
    )  # fmt: skip


def replayed(batch: Batch, cfg: Config, device: torch.device) -> list[Tensor] | None:
    """The experts that a step's answers were drawn by, where they are to be taken again: (B·S, K) by MoE layer."""
    if not isinstance(batch, Drawn) or batch.experts_LBSK is None or not cfg.objective.replay:
        return None
    return [layer.flatten(0, 1).to(device) for layer in batch.experts_LBSK]


def drawing_backend(cfg: Config) -> str:
    """The backend that answers are drawn with."""
    return cfg.dispatch if cfg.objective.draw_dispatch == "same" else cfg.objective.draw_dispatch


def drawing_precision(cfg: Config) -> AbstractContextManager[Any]:
    """The precision that answers are drawn in."""
    if cfg.objective.draw_precision == "same":
        return autocast(cfg)
    return autocast(replace(cfg, train=replace(cfg.train, precision=cfg.objective.draw_precision)))


def records(cfg: Config) -> bool:
    """Whether a draw keeps its experts: to be taken again, or to say how many are others in training."""
    moe = cfg.model.moe
    return moe is not None and facts(cfg.router).rectangular and moe.depth == 1


def rewards_of(
    answers: Rollout, texts: Sequence[str], right: Sequence[str], companions: Companions, cfg: Config
) -> Tensor:
    """(B,) float64."""
    if companions.judge is None:
        reward = REWARDS[cfg.objective.reward]
        rows = zip(texts, right, answers.stopped_B.tolist(), strict=True)
        return torch.tensor([reward(*row) for row in rows], dtype=torch.float64)
    with autocast(cfg):
        return judged(companions.judge, answers, cfg.dispatch)


# ---------------------------------------------------------------- losses


def micro_batch(batch: Batch, i: int, n: int, device: torch.device) -> Batch:
    """Part i of n of a step's batch, on the model's device."""
    cut = lambda tensor: tensor.chunk(n)[i].to(device)
    names = ("tokens_BS", "targets_BS", "domain_BS", "old_BS", "advantage_B", "weight_BS")
    parts = {name: cut(getattr(batch, name)) for name in names if hasattr(batch, name)}
    if isinstance(batch, Drawn) and batch.experts_LBSK is not None:
        parts["experts_LBSK"] = batch.experts_LBSK.chunk(n, dim=1)[i].to(device)
    return replace(batch, **parts)


def over_micro_batches(figures: list[dict[str, Tensor]]) -> dict[str, float]:
    """A step's figures from those of its micro-batches: the mean, and of `ratio` the largest."""
    names = figures[0] if figures else {}
    columns = {name: torch.stack([part[name] for part in figures]) for name in names}
    return {name: (column.amax() if name == "ratio" else column.mean()).item() for name, column in columns.items()}


def read(
    model: Transformer, tokens_BS: Tensor, targets_BS: Tensor, cfg: Config, **settings: Any
) -> tuple[Output, Tensor | None]:
    """A forward pass; of a reward model also every row's reward (B,), read where its last answer token has been."""
    if cfg.objective.name != "reward":
        return model(tokens_BS, **settings), None
    state_BSD, routing = model.states(tokens_BS, **settings)
    reward_B = model.rewards(state_BSD, last_place(targets_BS != NO_TARGET) + 1)
    return Output(divided(model.cfg, model.head(state_BSD.detach())).detach(), routing), reward_B


def answer_loss(
    output: Output,
    reward_B: Tensor | None,
    batch: Batch,
    companions: Companions,
    cfg: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch of as many as cfg.train.accumulate, whose mean is the step's; and its figures, whose
    mean are the step's too, but for `ratio`, a maximum. `batch`: the micro-batch, on the model's device."""
    match cfg.objective.name:
        case "reward":
            assert reward_B is not None
            chosen_P, rejected_P = reward_B.float()[0::2], reward_B.float()[1::2]
            margin_P = (chosen_P - rejected_P).detach()
            figures = {"accuracy": (margin_P > 0).float().mean(), "margin": margin_P.mean()}
            return reward_loss(chosen_P, rejected_P, cfg.objective.margin).mean(), figures
        case "dpo":
            return _dpo(output, batch, companions, cfg)
        case "grpo":
            assert isinstance(batch, Drawn)
            return _grpo(output, batch, companions, cfg)
    raise ValueError(f"objective.name={cfg.objective.name}")


def _dpo(output: Output, batch: Batch, companions: Companions, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    source = _reference(batch, companions, cfg)
    policy, reference = (answer_log_probs(said.logits_BSV, batch.targets_BS) for said in (output, source))
    margins = dpo_loss(policy, reference, cfg.objective.beta, cfg.objective.loss)
    ratio_B = (policy.log_prob_B - reference.log_prob_B).detach()
    figures = {
        "accuracy": (margins.chosen_P > margins.rejected_P).float().mean(),
        "chosen": ratio_B[0::2].mean(),
        "rejected": ratio_B[1::2].mean(),
        "length": policy.length_B[0::2].float().mean(),
    }
    read_BS = _read_places(batch.targets_BS)
    return margins.loss_P.mean(), figures | flips(output.routing, _experts(source.routing), read_BS)


def _grpo(output: Output, batch: Drawn, companions: Companions, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    objective, answer_BS = cfg.objective, batch.targets_BS != NO_TARGET
    log_prob_BS = token_log_probs(output.logits_BSV, batch.targets_BS, objective.temperature)
    source_BSV = _reference(batch, companions, cfg).logits_BSV
    reference_BS = token_log_probs(source_BSV, batch.targets_BS, objective.temperature)
    loss_BS = clipped_loss(log_prob_BS, batch.old_BS, batch.advantage_B, objective.clip_low, objective.clip_high)
    kl_BS = kl_estimate(log_prob_BS, batch.old_BS, reference_BS)
    loss = cfg.train.accumulate * (batch.weight_BS * (loss_BS + objective.kl * kl_BS)).sum()

    # What the step says of them.
    with torch.no_grad():
        ratio_BS = (log_prob_BS - batch.old_BS).exp()
        far_BS = answer_BS & ((ratio_BS < 1 - objective.clip_low) | (ratio_BS > 1 + objective.clip_high))
        figures = {
            "kl": torch.where(answer_BS, kl_BS, 0.0).sum() / len(answer_BS),
            "ratio": torch.where(answer_BS, ratio_BS.log().abs(), 0.0).amax(),
            "far": far_BS.sum() / answer_BS.sum(),
        }
    drawn_by = None if batch.experts_LBSK is None else list(batch.experts_LBSK)
    return loss, figures | flips(output.routing, drawn_by, _read_places(batch.targets_BS))


def _reference(batch: Batch, companions: Companions, cfg: Config) -> Output:
    """What the source says; it routes by itself, without gradients."""
    assert companions.reference is not None
    with torch.no_grad(), autocast(cfg):
        output: Output = companions.reference(batch.tokens_BS, backend=cfg.dispatch)
    return output


def _read_places(targets_BS: Tensor) -> Tensor:
    """(B, S) bool: what is read up to the last target of each row."""
    place_S = torch.arange(targets_BS.shape[1], device=targets_BS.device)
    return place_S <= last_place(targets_BS != NO_TARGET)[:, None]


def _experts(routing: list[LayerRouting]) -> list[Tensor] | None:
    """Every MoE layer's choices; None where they have no place for each token."""
    return None if any(layer.token_N is not None for layer in routing) else [layer.expert for layer in routing]


def flips(routing: list[LayerRouting], others: list[Tensor] | None, read_BS: Tensor) -> dict[str, Tensor]:
    """ "flips": over the places that are read and all MoE layers, the share whose set of experts is not that of
    `others`, (B·S, K) or (B, S, K) by layer. Nothing without them."""
    if not routing or others is None or any(layer.token_N is not None for layer in routing):
        return {}
    shares = []
    for layer, other in zip(routing, others, strict=True):
        other_TK = other.flatten(0, -2).to(layer.expert.device)
        shares.append(flipped(layer.expert, other_TK)[read_BS.flatten()].float().mean())
    return {"flips": torch.stack(shares).mean()}
