"""Answers to many prompts at once, for training on them: with the log-probabilities and the experts they were drawn by.

Prompts stand at the left, from position 0, whatever their lengths. All rows are read one place at a time behind the
shortest prompt: a row whose prompt goes on reads its next token there, any other draws one. So no row has padding
before or within it, one cache serves all, and a row's answer is what it would be alone. A row ends with a stop token,
which is part of its answer; behind it nothing counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config.router import facts
from moe.errors import BadInput
from moe.eval.generate import check_causal, next_token_distribution
from moe.model.attention import KVCache
from moe.model.layer import LayerRouting
from moe.model.transformer import Transformer
from moe.routing.contract import UNUSED


@dataclass
class Rollout:
    """B answers. S + 1 places of tokens, of which the last is predicted and never read; L MoE layers."""

    tokens_BS1: Tensor  # int64: prompt, answer, then padding
    answer_BS1: Tensor  # bool: which tokens were drawn, a stop token among them
    log_prob_BS1: Tensor  # float32, nats: of the drawn tokens under the distribution drawn from; 0 elsewhere
    stopped_B: Tensor  # bool: whether a stop token ended it, and not its length
    experts_LBSK: Tensor | None = None  # int64: of every place that was read; `UNUSED` behind a row's end

    def answers(self) -> list[list[int]]:
        """The drawn tokens of every row."""
        pairs = zip(self.tokens_BS1, self.answer_BS1, strict=True)
        return [tokens_S1[answer_S1].tolist() for tokens_S1, answer_S1 in pairs]

    def recorded(self) -> list[Tensor] | None:
        """What `Transformer.forward` takes as `recorded` to read the first S places again: (B·S, K) by layer."""
        return None if self.experts_LBSK is None else [layer.flatten(0, 1) for layer in self.experts_LBSK]


def check_prompts(prompts: Sequence[Sequence[int]], max_new: int, context: int) -> None:
    """Refuse a prompt without a token, and one behind which an answer of `max_new` tokens has no room. Raises
    `BadInput`."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise BadInput(f"prompt {i} is empty: accepted is at least one token.")
        if len(prompt) + max_new > context:
            raise BadInput(
                f"prompt {i} has {len(prompt)} tokens, and with an answer of up to {max_new} it is longer than "
                f"model.context={context}: give a shorter prompt or answer."
            )


@torch.no_grad()  # and not inference mode: what is drawn is trained on
def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    *,
    seeds: Sequence[int],
    stop: Sequence[int],
    pad: int,
    temperature: float = 1.0,
    backend: str = "torch",
    record: bool = False,
) -> Rollout:
    """Draw at most `max_new` tokens behind each prompt; `stop` tokens end one, `pad` stands behind its end.

    Row b draws by `seeds[b]` alone, the same tokens as `generate` with that seed. No global random state is read or
    changed. temperature 0: the most probable token, of log-probability 0. `record` keeps every layer's choices.

    Raises `BadInput` for models and prompts as `check_causal` and `check_prompts`, and with `record` for a router
    without a place for each choice."""
    check_causal(model)
    check_prompts(prompts, max_new, model.cfg.context)
    if record:
        check_recordable(model)
    device, dtype, n_rows = model.embed.weight.device, model.embed.weight.dtype, len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device

    # All rows, padded to the longest that may be; the shortest prompt is read at once.
    lengths = [len(prompt) for prompt in prompts]
    n_places = max(lengths) + max_new
    tokens_BS1 = torch.full((n_rows, n_places), pad, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        tokens_BS1[b, : len(prompt)] = torch.tensor(prompt)
    answer_BS1 = torch.zeros(tokens_BS1.shape, dtype=torch.bool)
    log_prob_BS1 = torch.zeros(tokens_BS1.shape)
    prompt_B, stop_N = torch.tensor(lengths), torch.tensor(list(stop), dtype=torch.int64)
    stopped_B, ended_B = torch.zeros(n_rows, dtype=torch.bool), torch.zeros(n_rows, dtype=torch.bool)
    cache = KVCache(model.cfg, n_rows, dtype, device)
    choices: list[list[Tensor]] = []

    for place in range(min(lengths), n_places):
        # What is not read yet, and the distribution of the next token.
        read_BS = tokens_BS1[:, cache.length : place]
        output = model(read_BS.to(device), backend=backend, cache=cache)
        if record:
            choices.append([_choices(routing, n_rows, ended_B) for routing in output.routing])
        prob_BV = next_token_distribution(output.logits_BSV[:, -1], temperature, 0, 1.0).cpu()

        # A draw in every row that is behind its prompt and not at its end.
        draws_B = (prompt_B <= place) & ~ended_B
        for b in draws_B.nonzero().flatten().tolist():
            token = torch.multinomial(prob_BV[b : b + 1], 1, generator=generators[b])[0, 0]
            tokens_BS1[b, place], log_prob_BS1[b, place] = token, prob_BV[b, token].log()
        answer_BS1[:, place] = draws_B
        stopped_B |= draws_B & torch.isin(tokens_BS1[:, place], stop_N)
        ended_B = stopped_B | (prompt_B + max_new <= place + 1)
        if ended_B.all():
            break

    n_places = place + 1
    experts = torch.stack([torch.cat(layer, dim=1) for layer in zip(*choices, strict=True)]) if record else None
    return Rollout(tokens_BS1[:, :n_places], answer_BS1[:, :n_places], log_prob_BS1[:, :n_places], stopped_B, experts)


def last_place(marked_BS: Tensor) -> Tensor:
    """(B, S) bool -> (B,) int64, the last place that is marked in each row, 0 where none is."""
    place_S = torch.arange(marked_BS.shape[1], device=marked_BS.device)
    return torch.where(marked_BS, place_S, 0).amax(-1)


@torch.no_grad()
def judged(judge: Transformer, answers: Rollout, backend: str = "torch") -> Tensor:
    """What a reward model gives every answer, read to its last token: (B,) float64 on the CPU."""
    device = judge.embed.weight.device
    state_BSD, _ = judge.states(answers.tokens_BS1.to(device), backend=backend)
    return judge.rewards(state_BSD, last_place(answers.answer_BS1).to(device)).double().cpu()


def check_recordable(model: Transformer) -> None:
    """Refuse a model whose choices have no place for each token. Raises `BadInput`."""
    if not model.cfg.moe:
        raise BadInput("the model is dense: there are no experts to record.")
    if not facts(model.router).rectangular or any(depth is not None for depth in model.depths()):
        raise BadInput(
            f"recording needs as many choices for every token, which router.name={model.router.name} with "
            f"model.moe.depth={model.cfg.moe.depth} does not give."
        )


def _choices(routing: LayerRouting, n_rows: int, ended_B: Tensor) -> Tensor:
    """(B, s, K) of a layer's choices for what was read; none where a row had ended."""
    expert_BSK = routing.expert.view(n_rows, -1, routing.expert.shape[-1]).cpu()
    return torch.where(ended_B[:, None, None], UNUSED, expert_BSK)
