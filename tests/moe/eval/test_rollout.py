"""Answers drawn together: the same as one at a time, as a forward pass over them says, and with a place for all."""

import math
from collections import Counter

import pytest
import torch

from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.eval.generate import generate
from moe.eval.rollout import rollout
from moe.model.transformer import Transformer
from moe.routing.contract import UNUSED
from tests.small_models import NEVER, build_model, tiny

CONTEXT, MAX_NEW = 24, 8
PROMPTS = [list(b"7+35="), list(b"a"), list(b"12+80 mod 10="), list(b"abc")]
SEEDS = [3, 1, 4, 1]


def build(moe=True, position="rope"):
    return build_model(moe, position, context=CONTEXT).eval()


def drawn(model, **changes):
    """In float64, so that what differs by more than rounding shows."""
    settings = {"max_new": MAX_NEW, "seeds": SEEDS, "stop": [NEVER], "pad": 256} | changes
    return rollout(model, PROMPTS, settings.pop("max_new"), **settings)


def stops(model):
    """Two tokens that some of the rows say on their way, so that they end at different places."""
    said = drawn(model).answers()
    return [said[0][2], said[2][5]]


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("moe", [False, True])
def test_answers_drawn_together_are_those_drawn_one_at_a_time(moe, position):
    model = build(moe, position)
    stop = stops(model)
    together = drawn(model, stop=stop)
    for prompt, seed, answer in zip(PROMPTS, SEEDS, together.answers(), strict=True):
        alone = []
        for token in generate(model, prompt, MAX_NEW, seed=seed, eot=NEVER):
            alone.append(token)
            if token in stop:
                break
        assert answer == alone
    assert together.stopped_B.tolist() == [answer[-1] in stop for answer in together.answers()]
    assert 0 < together.stopped_B.sum() < 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_a_forward_pass_over_the_whole(temperature):
    model = build()
    found = drawn(model, stop=stops(model), temperature=temperature)
    logits = model(found.tokens_BS1[:, :-1]).logits_BSV.detach() / temperature
    expected = torch.log_softmax(logits, -1).gather(-1, found.tokens_BS1[:, 1:, None])[..., 0]
    expected = torch.where(found.answer_BS1[:, 1:], expected, 0.0)
    torch.testing.assert_close(found.log_prob_BS1[:, 1:].double(), expected, rtol=1e-5, atol=1e-6)
    assert (found.log_prob_BS1[found.answer_BS1] < 0).all()


def test_the_experts_are_those_of_a_forward_pass_and_none_behind_an_end():
    model = build()
    found = drawn(model, stop=stops(model), record=True)
    output = model(found.tokens_BS1[:, :-1])
    ends = found.answer_BS1.shape[1] - 1 - found.answer_BS1.flip(1).to(torch.uint8).argmax(1)
    for recorded, routing in zip(found.recorded(), output.routing, strict=True):
        recorded_BSK = recorded.view(4, -1, 2)
        routed_BSK = routing.expert.view(4, -1, 2)
        for b, end in enumerate(ends.tolist()):
            assert torch.equal(recorded_BSK[b, :end], routed_BSK[b, :end])
            assert (recorded_BSK[b, end:] == UNUSED).all()


def test_replaying_the_experts_of_a_rollout_changes_no_answers_probability():
    model = build()
    found = drawn(model, stop=stops(model), record=True)
    inside = found.answer_BS1[:, 1:]
    free = model(found.tokens_BS1[:, :-1]).logits_BSV[inside]
    replayed = model(found.tokens_BS1[:, :-1], recorded=found.recorded()).logits_BSV[inside]
    torch.testing.assert_close(replayed, free, rtol=1e-12, atol=1e-12)


def test_where_documents_are_separate_an_answer_is_what_it_is_alone():
    model = Transformer(tiny(context=CONTEXT), RouterConfig(), document_end=256).initialize(0).double().eval()
    together = drawn(model)
    assert together.answers()[2] == list(generate(model, PROMPTS[2], MAX_NEW, seed=SEEDS[2], eot=NEVER))


def test_a_row_draws_by_its_seed_alone_and_no_global_state_moves():
    model, before = build(), torch.get_rng_state()
    whole = drawn(model).answers()
    fewer = rollout(model, PROMPTS[2:], MAX_NEW, seeds=SEEDS[2:], stop=[NEVER], pad=0).answers()
    assert fewer == whole[2:]
    assert torch.equal(before, torch.get_rng_state())
    assert drawn(model, seeds=[9, 1, 4, 1]).answers()[1:] == whole[1:]
    assert drawn(model, seeds=[9, 1, 4, 1]).answers()[0] != whole[0]


def test_at_temperature_0_it_is_the_most_probable_text():
    model = build()
    found = drawn(model, temperature=0.0)
    for prompt, answer in zip(PROMPTS, found.answers(), strict=True):
        assert answer == list(generate(model, prompt, MAX_NEW, temperature=0, eot=NEVER))
    assert (found.log_prob_BS1 == 0).all()


def test_first_tokens_come_as_often_as_their_probability_says():
    model, n = build(), 2000
    found = rollout(model, [PROMPTS[0]] * n, 1, seeds=range(n), stop=[NEVER], pad=0)
    prob = torch.softmax(model(torch.tensor(PROMPTS[:1])).logits_BSV[0, -1].detach(), -1)
    count = Counter(answer[0] for answer in found.answers())
    chi_square = sum((count[v] - n * p) ** 2 / (n * p) for v, p in enumerate(prob.tolist()))
    assert chi_square < 257 + 5 * math.sqrt(2 * 257)


def test_a_rollout_is_no_longer_than_its_longest_row():
    found = drawn(build(), max_new=2)
    assert found.tokens_BS1.shape == (4, len(PROMPTS[2]) + 2)
    assert found.answer_BS1.sum(1).tolist() == [2] * 4


def test_what_has_no_room_or_no_token_is_refused():
    model = build()
    for prompts, words in (
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 20], "prompt 0 has 20 tokens, and with an answer"),
    ):
        with pytest.raises(BadInput, match=words):
            rollout(model, prompts, MAX_NEW, seeds=[0, 0], stop=[], pad=0)


def test_choices_that_have_no_place_are_not_recorded():
    with pytest.raises(BadInput, match="the model is dense"):
        drawn(build(moe=False), record=True)
    ragged = Transformer(tiny(context=CONTEXT), RouterConfig(name="expert-choice", causal="threshold")).initialize(0)
    with pytest.raises(BadInput, match=r"which router\.name=expert-choice with model\.moe\.depth=1"):
        drawn(ragged, record=True)


def test_a_router_that_chooses_among_all_tokens_draws_nothing():
    model = Transformer(tiny(context=CONTEXT), RouterConfig(name="expert-choice")).initialize(0)
    with pytest.raises(BadInput, match=r"router\.name=expert-choice chooses among all tokens at once"):
        drawn(model)
