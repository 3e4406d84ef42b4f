"""Claims about the answers that lm-evaluation-harness gets, against those of its own adapter for transformers on the
exported folder of the same model."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_tokenizer import text_start
from moe.convert.hf_weights import save
from moe.data.tokenizer import Tokenizer, train
from moe.errors import BadInput
from moe.eval import tasks
from moe.eval.generate import sample
from moe.eval.harness import HERE, Asked, ask, load
from moe.eval.scores import Interval
from moe.model.transformer import Transformer
from tests.small_models import BYTES, build_model

CONTEXT = 48
TEXT = "the king said to the queen that the crown is of gold, and the queen said nothing to the king. " * 20
BPE = train(TokenizerConfig("bpe", 280), [TEXT])


def asked(model, tokenizer=BYTES, **changes):
    said = []
    return Asked(
        model, tokenizer, **{"context": model.cfg.context, "batch_size": 4, "say": said.append} | changes
    ), said


def requests(kind, arguments):
    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module", params=["dense", "moe"])
def both(request, tmp_path_factory):
    """A model with a BPE of 280 tokens as it is here, and the harness' own adapter on its exported folder."""
    moe = MoEConfig(n_experts=4, k=2, d_expert=16) if request.param == "moe" else None
    changes = {"n_heads": 2, "d_ff": 32, "moe": moe, "tie_embeddings": False, "init_std": 0.3}
    changes |= {"qk_norm": "full"} if moe else {}
    model = Transformer(ModelConfig("m", BPE.vocab_size, CONTEXT, 2, 32, **changes), RouterConfig()).initialize(0)
    folder = tmp_path_factory.mktemp("hf") / "model"
    save(model, RouterConfig(), BPE, folder)
    return model, lambda batch_size: HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)


PAIRS = [
    ("the king said", " to the queen"),
    ("the king said ", "to the queen"),  # a space that is the continuation's
    ("", "the queen"),
    ("the", " crown"),
    (" ".join(TEXT.split()[:60]), " of gold"),  # longer than the context
    ("the crown is of", " gold, and nothing else that anybody had ever said to the king."),
    ("a line\n", "and another"),
]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations_are_as_probable_as_to_the_harness_on_transformers(both, batch_size):
    model, theirs = both
    expected = theirs(batch_size).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    lm, said = asked(model, BPE, batch_size=batch_size)
    answers = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in answers] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert len(said) == 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_greedy_decoding_says_is_told_from_what_it_does_not_say(both, batch_size):
    """Its first tokens, and the same with the last one changed."""
    model, theirs = both
    context = BPE.encode("the king")
    greedy = [int(token) for token in sample(model, [context], 4, temperature=0)]
    wanted = [(("", ""), context, ids) for n in (1, 4) for ids in (greedy[:n], [*greedy[: n - 1], 7])]
    expected = theirs(batch_size)._loglikelihood_tokens(wanted, disable_tqdm=True)
    answers = asked(model, BPE, batch_size=batch_size)[0]._loglikelihood_tokens(wanted)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected] == [True, False] * 2
    assert [nats for nats, _ in answers] == pytest.approx([nats for nats, _ in expected], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_as_probable_window_by_window(both, batch_size):
    """Shorter than the context, exactly as long, one token longer, and several windows long."""
    model, theirs = both
    ids = BPE.encode(TEXT)
    texts = [BPE.decode(ids[: CONTEXT + more]) for more in (-30, 0, 1, 2 * CONTEXT + 7)]
    assert [len(BPE.encode(text)) for text in texts] == [18, 48, 49, 151]
    expected = theirs(batch_size).loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    lm, said = asked(model, BPE, batch_size=batch_size)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(expected, rel=1e-6)
    assert not said


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_said_is_the_same(both, batch_size):
    """With strings that end it, a prompt that is cut, and several manners in one batch."""
    model, theirs = both
    prompts = ["the king", "the queen said to", "of gold", "and", " ".join(TEXT.split()[:60]), "the king"]
    plain = {"until": [], "max_gen_toks": 12}
    whole = theirs(1).generate_until(requests("generate_until", [(text, plain) for text in prompts]))
    ends = [text[len(text) // 2 :][:2] for text in whole]  # so that the strings do end some
    wanted = [(text, {"until": [end], "max_gen_toks": 12}) for text, end in zip(prompts, ends, strict=True)]
    wanted += [(text, {"until": ends[:2], "max_gen_toks": 9, "do_sample": False}) for text in prompts]
    expected = theirs(batch_size).generate_until(requests("generate_until", wanted), disable_tqdm=True)
    lm, said = asked(model, BPE, batch_size=batch_size)
    assert lm.generate_until(requests("generate_until", wanted)) == expected
    assert set(map(len, expected)) != {0}
    assert [text[: len(short)] for text, short in zip(whole, expected, strict=False)] == expected[:6]
    assert len(said) == 1


def test_a_folder_whose_tokenizer_begins_every_text_with_a_token_is_asked_so(both, tmp_path):
    """But for whole texts: the harness puts the token before them twice."""
    model, theirs = both
    folder = Path(shutil.copytree(theirs(1).pretrained, tmp_path / "model"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [BPE.eot], "tokens": ["<|endoftext|>"]},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    adapter = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    lm, _ = asked(model, BPE, start=text_start(folder, BPE))
    assert lm.tok_encode("the king") == adapter.tok_encode("the king") == [BPE.eot, *BPE.encode("the king")]
    wanted = requests("loglikelihood", PAIRS)
    expected, answers = (one.loglikelihood(wanted, disable_tqdm=True) for one in (adapter, lm))
    assert [nats for nats, _ in answers] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert answers != asked(model, BPE)[0].loglikelihood(wanted, disable_tqdm=True)
    prompts = [(text, {"until": ["e"], "max_gen_toks": 9}) for text in ("the king", "the queen said to", "of gold")]
    wanted = requests("generate_until", prompts)
    assert lm.generate_until(wanted) == adapter.generate_until(wanted, disable_tqdm=True)
    texts = requests("loglikelihood_rolling", [TEXT])
    assert lm.loglikelihood_rolling(texts) == asked(model, BPE)[0].loglikelihood_rolling(texts)


# --- where the harness' own adapter goes wrong, or gives up ---


def test_a_token_across_the_join_loses_no_text_of_the_continuation():
    """Theirs has no token left here, or another text's; ours scores the continuation's own."""
    model = build_model(context=CONTEXT, dtype=torch.float32)
    ranks = {**BYTES.ranks, b"ab": 256, b"abc": 257}
    tokenizer = Tokenizer("bpe", r"[a-z]+|.", ranks, {"<|endoftext|>": 258})
    lm, _ = asked(Transformer(replace(model.cfg, vocab_size=259), RouterConfig()).initialize(0), tokenizer)
    for context, continuation in (("a", "b"), ("ab", "c"), ("ab", "cd"), ("xa", "bc")):
        context_ids, continuation_ids = lm._encode_pair(context, continuation)
        assert tokenizer.decode(context_ids) == context
        assert tokenizer.decode(continuation_ids) == continuation
        ours = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
        assert ours == lm._loglikelihood_tokens([(None, tokenizer.encode(context), tokenizer.encode(continuation))])
    theirs = super(Asked, lm)._encode_pair
    assert theirs("ab", "c") == ([256], [])
    assert tokenizer.decode([i for ids in theirs("ab", "cd") for i in ids]) == "abd"


def test_a_context_of_white_space_is_the_beginning_of_a_text():
    lm, _ = asked(build_model(context=CONTEXT, dtype=torch.float32))
    assert lm._encode_pair(" \n", "a") == ([BYTES.eot], list(b" \na"))
    answers = lm.loglikelihood(requests("loglikelihood", [(" ", "a"), ("", " a")]), disable_tqdm=True)
    assert answers[0] == pytest.approx(answers[1])


def test_no_token_is_put_before_a_text_but_the_end_of_text_before_an_empty_one():
    model, read = build_model(context=CONTEXT, dtype=torch.float32), []
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()))
    lm, _ = asked(model, batch_size=1)
    lm.loglikelihood(requests("loglikelihood", [("ab", "cd"), ("", "cd")]), disable_tqdm=True)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", ["x" * (CONTEXT + 3)]))
    assert read[:2] == [[list(b"abc")], [[BYTES.eot, *b"c"]]]
    assert read[2:] == [[[BYTES.eot, *b"x" * (CONTEXT - 1)]], [list(b"x" * CONTEXT)]]


def test_the_probabilities_of_all_continuations_of_a_text_sum_to_one():
    lm, _ = asked(build_model(context=CONTEXT, dtype=torch.float64))
    answers = lm._loglikelihood_tokens([(None, [65], [token]) for token in range(257)])
    assert sum(math.exp(nats) for nats, _ in answers) == pytest.approx(1, abs=1e-9)
    assert sum(greedy for _, greedy in answers) == 1


# --- generation ---


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ([], "one\n\ntwo"),
        (["\n"], "one"),
        (["two", "\n\n"], "one"),  # the one that comes first in the text
        (["e"], "on"),
        (["", "w"], "one\n\nt"),
        (["o"], ""),
    ],
)
def test_an_answer_ends_before_the_first_string_that_ends_it(until, expected, monkeypatch):
    monkeypatch.setattr("moe.eval.harness.sample", lambda *_, **__: (torch.tensor([i]) for i in b"one\n\ntwo"))
    lm, _ = asked(build_model())
    assert lm.generate_until(requests("generate_until", [("a", {"until": until, "max_gen_toks": 8})])) == [expected]


def test_nothing_is_generated_once_every_answer_has_ended(monkeypatch):
    steps = []

    def said(*_, **__):
        for token_B in ([65, 10], [66, 65], [256, 65], [67, 67]):
            steps.append(token_B)
            yield torch.tensor(token_B)

    monkeypatch.setattr("moe.eval.harness.sample", said)
    lm, _ = asked(build_model())
    wanted = {"until": ["\n"], "max_gen_toks": 8}
    assert lm.generate_until(requests("generate_until", [("a", wanted), ("b", wanted)])) == ["AB", ""]
    assert len(steps) == 3


def test_a_task_that_says_nothing_gets_answers_that_leave_room_for_the_question():
    lm, _ = asked(build_model(context=CONTEXT))
    assert lm.manner({"until": "."}) == (CONTEXT // 2, (".",), 0, 0, 1)
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 5, "num_beams": 1}
    assert lm.manner(drawn) == (5, (), 0.5, 3, 0.9)
    assert lm.manner({"do_sample": False, "temperature": 0.5}).temperature == 0


# --- what cannot be ---


@pytest.mark.parametrize(
    ("ask_it", "sentence"),
    [
        (
            lambda lm: lm._loglikelihood_tokens([(None, [1], [2] * 13)]),
            "a continuation of 13 tokens is longer than the 12",
        ),
        (lambda lm: lm.manner({"max_gen_toks": 12}), "answers of 12 tokens, and the model reads 12 with the question"),
        (lambda lm: lm.manner({"num_beams": 3}), "a task wants num_beams=3 of generation: accepted are until"),
        (
            lambda lm: ask(lm, ["arithmetik"]),
            "'arithmetik', which is none of arithmetic, copy.*did you mean arithmetic",
        ),
        (lambda lm: ask(lm, ["copy", ""]), "tasks has '', which is none of"),
        (lambda lm: ask(lm, ["copy"], fewshot=17), "fewshot=17 is out of range: arithmetic, .* have 16 examples"),
        (lambda lm: ask(lm, ["heldout"]), "heldout has no text: give one with text"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(ask_it, sentence):
    with pytest.raises(BadInput, match=sentence):
        ask_it(asked(build_model())[0])


def test_a_task_whose_questions_cannot_be_fetched_is_refused_with_those_that_can_be_had(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub.\nmore")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(BadInput, match=r"task piqa cannot be had \(no route to the hub\): without .* are arithmetic, "):
        ask(asked(build_model())[0], ["piqa"])


def test_a_router_that_chooses_among_all_tokens_is_refused():
    model = Transformer(build_model().cfg, RouterConfig("expert-choice")).initialize(0)
    with pytest.raises(
        BadInput,
        match=r"router\.name=expert-choice chooses among all tokens at once and cannot choose for the next one",
    ):
        asked(model)


def test_probabilities_that_are_not_finite_are_refused():
    model = build_model()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(BadInput, match="log-probability nan: choose another checkpoint"):
        asked(model)[0]._loglikelihood_tokens([(None, [1], [2])])


# --- tasks ---


def rows(scores):
    return {(row.task, row.metric): row for row in scores}


def test_tasks_are_scored_as_by_hand():
    """Accuracy, its standard error and interval, and what chance gives, of the requests' own answers."""
    lm, _ = asked(build_model(context=128, dtype=torch.float32), batch_size=16)
    (row,) = ask(lm, ["brackets"], limit=40)
    right = []
    for question in tasks.documents("brackets")[1][:40]:
        pairs = [(None, list(question["text"].encode()), list(choice.encode())) for choice in question["choices"]]
        nats = [answer[0] for answer in lm._loglikelihood_tokens(pairs)]
        right.append(nats.index(max(nats)) == question["gold"])
    share = sum(right) / 40
    stderr = math.sqrt(share * (1 - share) / 39)
    assert (row.score.value, row.stderr) == pytest.approx((share, stderr))
    assert (row.score.low, row.score.high) == pytest.approx((share - 1.96 * stderr, share + 1.96 * stderr), abs=1e-4)
    assert (row.n, row.fewshot, row.chance) == (40, 0, 0.25)


def test_a_model_that_knows_the_answers_gets_every_task_right(monkeypatch):
    """So no question is put wrongly: the right choice is the one that is scored as right."""
    lm, _ = asked(build_model(context=CONTEXT))
    truth = {}
    for name in tasks.TASKS:
        for question in tasks.documents(name)[1]:
            answer = question["answer"] if "answer" in question else question["choices"][question["gold"]]
            truth[question["text"]] = tasks.TASKS[name].between + answer
    knows = lambda asked_for: [(-float(truth[each.args[0]] != each.args[1]), True) for each in asked_for]
    monkeypatch.setattr(lm, "loglikelihood", knows)
    monkeypatch.setattr(lm, "generate_until", lambda asked_for: [f"{truth[each.args[0]]}" for each in asked_for])
    scores = rows(ask(lm, list(tasks.TASKS)))
    assert {key[0] for key in scores} == set(tasks.TASKS)
    # That all are right is no certainty.
    assert {(row.score, row.stderr) for row in scores.values()} == {(Interval(1.0, -math.inf, math.inf), 0.0)}
    assert {row.n for row in scores.values()} == {300}


def test_examples_stand_before_a_question_with_their_answers(monkeypatch):
    lm, _ = asked(build_model(context=CONTEXT))
    seen = []
    monkeypatch.setattr(
        lm, "loglikelihood", lambda asked_for: [seen.append(each.args) or (0.0, True) for each in asked_for]
    )
    (row, _) = ask(lm, ["arithmetic"], limit=2, fewshot=3)
    assert row.fewshot == 3
    shown = {f"{q['text']} {q['choices'][q['gold']]}" for q in tasks.documents("arithmetic")[0]}
    *examples, question = seen[0][0].split("\n\n")
    assert len(examples) == 3
    assert set(examples) < shown
    assert question == tasks.documents("arithmetic")[1][0]["text"]


def test_held_out_text_has_the_bits_of_its_bytes():
    lm, _ = asked(build_model(context=CONTEXT, dtype=torch.float32))
    texts = ["the king", "é and é, " * 20]
    (row,) = ask(lm, ["heldout"], held_out=lambda: [*texts, ""])
    nats = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert row.score.value == pytest.approx(-sum(nats) / math.log(2) / n_bytes)
    assert row.score.low < row.score.value < row.score.high
    assert (row.metric, row.n, row.stderr, row.chance) == ("bits_per_byte", 2, None, None)


def test_a_task_that_takes_no_examples_gets_none_where_others_get_theirs():
    lm, _ = asked(build_model(context=CONTEXT, dtype=torch.float32))
    scores = ask(lm, ["latent", "heldout"], limit=2, fewshot=2, held_out=lambda: ["the king", "the queen"])
    assert {row.task: row.fewshot for row in scores} == {"latent": 2, "heldout": 0}


def test_asking_leaves_the_model_the_harness_log_and_the_random_state_as_they_were():
    model = build_model(context=CONTEXT, dtype=torch.float32).train()
    before, level = torch.get_rng_state(), logging.getLogger("lm_eval").level
    ask(asked(model)[0], ["copy", "latent"], limit=4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.getLogger("lm_eval").level == level


def test_the_harness_itself_takes_the_model():
    """`simple_evaluate`, as its documentation says, gives the same numbers."""
    lm, _ = asked(build_model(context=128, dtype=torch.float32), batch_size=16)
    loaded = load(["latent"], None, list)["tasks"]
    settings = {"task_manager": TaskManager(include_defaults=False), "limit": 20, "bootstrap_iters": 0}
    theirs = simple_evaluate(lm, tasks=list(loaded.values()), **settings)["results"]["latent"]
    (ours,) = ask(lm, ["latent"], limit=20)
    assert ours.score.value == theirs["acc,none"]
    assert "latent" in HERE
