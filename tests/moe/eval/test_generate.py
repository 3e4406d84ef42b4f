"""Sampling, next-token probabilities and streamed text, against brute force."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.generate import repr_token
from moe.errors import BadInput
from moe.eval.generate import LayerChoice, generate, next_token_distribution, next_tokens, sample, stream_text
from moe.model.attention import KVCache
from moe.model.layer import LayerRouting
from tests.small_models import BYTES, CONTEXT, NEVER, PROMPT, Constant, build_model

# --- cache and context ---


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("moe", [False, True])
def test_cached_logits_equal_uncached_ones_however_the_tokens_are_split(moe, position):
    model = build_model(moe, position)
    tokens_BS = torch.randint(257, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BS).logits_BSV
    for pieces in ([CONTEXT], [1] * CONTEXT, [5, 1, 4, 2]):
        cache = KVCache(model.cfg, 2, torch.float64, torch.device("cpu"))
        parts = [model(part, cache=cache).logits_BSV for part in tokens_BS.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


def by_hand(model, ids, max_new):
    """Greedy text, the window cut by the documented rule, every position computed again."""
    window, said = ids[-CONTEXT:], []
    for _ in range(max_new):
        if len(window) == CONTEXT + 1:
            window = window[CONTEXT + 1 - CONTEXT // 2 :]
        said.append(int(model(torch.tensor([window])).logits_BSV[0, -1].argmax()))
        window = [*window, said[-1]]
    return said


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("length", [1, CONTEXT, 3 * CONTEXT])
def test_cached_and_uncached_generations_agree_beyond_the_context_too(moe, position, length):
    model = build_model(moe, position)
    ids = torch.randint(257, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_new": 3 * CONTEXT, "eot": NEVER, "seed": 5}
    sampled = [list(generate(model, ids, use_cache=cached, **settings)) for cached in (True, False)]
    assert sampled[0] == sampled[1]
    assert len(sampled[0]) == 3 * CONTEXT
    greedy = list(generate(model, ids, temperature=0, **settings))
    assert greedy == by_hand(model, ids, 3 * CONTEXT)


@pytest.mark.parametrize("moe", [False, True])
def test_prompts_of_one_length_are_continued_together_as_each_alone(moe):
    model = build_model(moe)
    prompts = torch.randint(257, (3, 7), generator=torch.Generator().manual_seed(2)).tolist()
    together = torch.stack(list(sample(model, prompts, 3 * CONTEXT, temperature=0)), dim=1).tolist()
    assert together == [list(generate(model, ids, 3 * CONTEXT, temperature=0, eot=NEVER)) for ids in prompts]


def test_a_cache_has_room_for_what_is_read_and_no_more(monkeypatch):
    rooms = []
    real = KVCache.__init__
    spy = lambda cache, cfg, *rest: rooms.append(cfg.context) or real(cache, cfg, *rest)
    monkeypatch.setattr(KVCache, "__init__", spy)
    for max_new in (4, 3 * CONTEXT):
        list(generate(build_model(), PROMPT, max_new, eot=NEVER))
    assert rooms == [len(PROMPT) + 4, CONTEXT]


def test_a_context_of_one_token_works():
    assert len(list(generate(build_model(context=1), PROMPT, 4, eot=NEVER))) == 4


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    model = build_model()
    assert list(generate(model, [], 5, eot=256, seed=1)) == list(generate(model, [256], 5, eot=256, seed=1))


def test_generation_ends_before_the_end_of_text_token():
    model = build_model()
    said = list(generate(model, PROMPT, 30, eot=NEVER, seed=1))
    stop = said[7]
    assert list(generate(model, PROMPT, 30, eot=stop, seed=1)) == said[: said.index(stop)]


# --- sampling ---


@settings(max_examples=100)
@given(
    rows=st.lists(st.lists(st.integers(1, 60), min_size=7, max_size=7), min_size=1, max_size=3),
    power=st.integers(1, 3),
    top_k=st.integers(0, 9),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1)),
)
def test_the_distribution_equals_a_brute_force_one(rows, power, top_k, top_p):
    expected = []
    for row in rows:
        mass = [weight**power for weight in row]  # softmax(log(w) · power), unnormalised, in whole numbers
        order = sorted(range(len(row)), key=lambda i: (-mass[i], i))[: top_k or None]
        total = sum(mass[i] for i in order)
        sums = [sum(mass[i] for i in order[:size]) / total for size in range(1, len(order) + 1)]
        assume(all(abs(each - top_p) > 1e-9 for each in sums) or top_p == 1)
        kept = order if top_p == 1 else order[: next(size for size, each in enumerate(sums, 1) if each >= top_p)]
        kept_total = sum(mass[i] for i in kept)
        expected.append([mass[i] / kept_total if i in kept else 0.0 for i in range(len(row))])
    prob_BV = next_token_distribution(torch.tensor(rows).double().log(), 1 / power, top_k, top_p)
    torch.testing.assert_close(prob_BV, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-3])
def test_no_temperature_and_hardly_any_is_the_largest_logit(temperature):
    prob_BV = next_token_distribution(torch.tensor([[1.0, 900.0, -900.0], [3.0, 1.0, 2.0]]), temperature, 0, 1.0)
    assert prob_BV.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(BadInput, match="NaN or infinity"):
        next_token_distribution(torch.tensor([[0.0, bad]]), temperature, 0, 1.0)


def test_sampled_frequencies_are_the_probabilities():
    probabilities, n = [0.5, 0.3, 0.15, 0.05], 2000
    model = Constant([math.log(p) for p in probabilities])
    count = Counter(generate(model, [0], n, eot=NEVER, use_cache=False, seed=0))
    chi_square = sum((count[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities))
    assert chi_square < 25  # three degrees of freedom: above it once in 60,000
    nucleus = Counter(generate(model, [0], n, eot=NEVER, use_cache=False, top_p=0.7))
    assert set(nucleus) == {0, 1}
    assert abs(nucleus[0] / n - 0.5 / 0.8) < 0.05


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    model = build_model()
    first, again, other = (list(generate(model, PROMPT, 20, eot=NEVER, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_global_random_state_is_neither_read_nor_changed():
    model = build_model()
    said = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        said.append(list(generate(model, PROMPT, 5, eot=NEVER)))
        assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == said[1]


def test_generating_records_no_gradient_and_leaves_the_callers_mode_alone():
    model, recording = build_model(), []
    model.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    tokens = generate(model, PROMPT, 3, eot=NEVER)
    next(tokens)
    assert recording == [False]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# --- text ---


@given(text=st.text(st.characters(exclude_categories=["Cs"])), cut=st.integers(0, 40))
def test_characters_are_streamed_whole_and_an_unfinished_one_is_held_back(text, cut):
    ids = list(text.encode())[: -cut or None]
    pieces = list(stream_text(BYTES, iter(ids)))
    complete = bytes(ids).decode(errors="ignore")
    assert "".join(pieces) == complete
    assert "".join(pieces) == text[: len(complete)]


def test_a_character_is_streamed_as_soon_as_it_is_complete():
    taken = []
    ids = (taken.append(each) or each for each in "漢字".encode())
    assert next(stream_text(BYTES, ids)) == "漢"
    assert len(taken) == 3


def test_bytes_that_are_no_text_become_replacement_characters():
    assert "".join(stream_text(BYTES, [0xFF, 0x41])) == "\ufffdA"


def test_a_token_that_only_the_model_has_is_no_text():
    assert "".join(stream_text(BYTES, [0x41, BYTES.vocab_size, 0x42])) == "AB"
    assert repr_token(BYTES, BYTES.vocab_size) == "''"


# --- next tokens and experts ---


def test_next_tokens_are_the_softmax_in_order():
    model = build_model()
    prob_V = model(torch.tensor([PROMPT])).logits_BSV[0, -1].softmax(-1).tolist()
    tokens, _ = next_tokens(model, PROMPT, 9)
    assert [each for each, _ in tokens] == sorted(range(257), key=lambda i: -prob_V[i])[:9]
    assert [p for _, p in tokens] == pytest.approx([prob_V[each] for each, _ in tokens])
    assert len(next_tokens(model, PROMPT * 9, 1000)[0]) == 257  # longer than the context; more than there are


def test_reported_experts_are_those_the_last_token_was_routed_to():
    model = build_model()
    seen = {}
    for block in model.blocks:
        if hasattr(block.mlp, "router"):
            hook = lambda router, inputs, _, layer=block.layer: seen.update({layer: (router, inputs[0][-1])})
            block.mlp.router.register_forward_hook(hook)
    _, choices = next_tokens(model, PROMPT, 1)
    assert [each.layer for each in choices] == [1, 3] == sorted(seen)
    for layer, experts in choices:
        router, x_D = seen[layer]
        score_E = (router.w_ED.detach() @ x_D).softmax(-1).tolist()
        best = sorted(range(4), key=lambda e: -score_E[e])[:2]
        assert [e for e, _ in experts] == best
        assert [w for _, w in experts] == pytest.approx([score_E[e] / sum(score_E[b] for b in best) for e in best])


def test_a_dense_model_reports_no_experts():
    assert next_tokens(build_model(moe=False), PROMPT, 1)[1] == []


def test_experts_of_ragged_and_dropped_rows_are_the_last_tokens_own():
    rest = dict.fromkeys(("losses", "count_E", "wanted_E", "dropped", "skipped", "observed", "state_TD"))
    ragged = LayerRouting(
        expert=torch.tensor([0, 3, 2, -1]),
        weight=torch.tensor([1.0, 0.25, 0.75, 0.5]),
        token_N=torch.tensor([0, 1, 1, 1]),
        **rest,
    )
    _, choices = next_tokens(Constant([0.0] * 3, [ragged]), [0, 0], 1)
    assert choices == [LayerChoice(1, [(2, 0.75), (3, 0.25)])]
