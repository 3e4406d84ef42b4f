"""Claims about conversations with run.c: its answers are the model's to what the template writes, turn by turn."""

import itertools
import subprocess

import pytest
import torch

from moe.config.data import TokenizerConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.convert import export_c
from moe.data.chat import DEFAULT, Template
from moe.data.tokenizer import END_OF_TEXT, Tokenizer, train
from moe.eval.generate import generate
from tests.c_program import NEEDS_COMPILER, random_model, sizes
from tests.moe.convert.test_turns import CHATML

pytestmark = NEEDS_COMPILER

USER = ["What is 2 plus 3?", " and é ", "", "Who?!"]
SPECIALS = {END_OF_TEXT: 256, "<|im_start|>": 257, "<|im_end|>": 258}


def tokenizer_of(kind, source):
    learned = train(TokenizerConfig("bpe", vocab_size=300), [DEFAULT * 3, "What is the question? " * 9])
    specials = {text: 300 + i for i, text in enumerate(SPECIALS)} if kind == "bpe" else SPECIALS
    ranks, pattern = (
        (learned.ranks, learned.pattern)
        if kind == "bpe"
        else (
            {bytes([value]): value for value in range(256)},
            r"(?s).",
        )
    )
    tokenizer = Tokenizer(kind, pattern, ranks, specials)
    tokenizer.template = source
    return tokenizer


def expected_answers(model, tokenizer, users, system, n_new):
    """Of each turn the ids of the answer, as the model gives them behind the conversation in ids; answers are kept as
    they were said."""
    template = Template(tokenizer.template, specials=[*tokenizer.specials])
    end, messages, ids, answers = tokenizer.encode(template.end_of_turn, specials=True), [], [], []
    if system:
        messages.append({"role": "system", "content": system})
    for user in users:
        # What the template writes since the last answer, whose words are of no matter.
        before = template.render(messages).text if answers else ""
        before = before[: before.rindex(template.end_of_turn) + len(template.end_of_turn)] if before else ""
        messages.append({"role": "user", "content": user})
        text = template.render(messages, reply=True).text
        assert text.startswith(before)
        ids = [*ids, *tokenizer.encode(text[len(before) :], specials=True)]
        answer = list(generate(model, ids, n_new, temperature=0, eot=tokenizer.eot))
        stops = [i for i in range(len(answer)) if answer[i : i + len(end)] == end]
        answers.append(answer[: stops[0]] if stops else answer)
        ids = [*ids, *answers[-1], *end]
        messages.append({"role": "assistant", "content": "so"})
    return answers


@pytest.mark.parametrize(
    ("kind", "source", "system", "context"),
    [
        ("byte", DEFAULT, "", 500),
        ("byte", DEFAULT, "Be brief.", 150),  # the conversation outgrows the context
        ("bpe", DEFAULT, "Be brief.", 300),
        ("byte", CHATML, "", 150),
        ("bpe", CHATML, "Be brief.", 300),
    ],
)
def test_every_answer_is_the_models_to_the_conversation_as_the_template_writes_it(kind, source, system, context, say):
    tokenizer = tokenizer_of(kind, source)
    assert export_c.why_no_chat(tokenizer) == ""
    cfg = sizes(MoEConfig(4, 2, 32), vocab_size=tokenizer.vocab_size, context=context, d_model=32, n_heads=2)
    model = random_model(cfg, RouterConfig())
    options = ("--chat", "-n", "40", "-t", "0", "--ids", *(("-p", system) if system else ()))
    done = say(model, *options, tokenizer=tokenizer, lines="\n".join(USER).encode())
    said = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert said == expected_answers(model, tokenizer, USER, system, 40)
    assert len({tuple(answer) for answer in said}) == len(USER)


@pytest.mark.parametrize("source", [DEFAULT.replace("<|end|>", "</x>"), CHATML])
@pytest.mark.parametrize(("n_new", "shown"), [(60, b"ok "), (5, b"ok </"), (2, b"ok")])
def test_an_answer_ends_where_the_model_ends_its_turn_and_the_end_is_not_shown(source, n_new, shown, say):
    """Of a model that says "ok " and the end of a turn, as each token alone says which comes next."""
    tokenizer = tokenizer_of("byte", source)
    model = random_model(sizes(vocab_size=259, context=200, tie_embeddings=False, n_layers=1), RouterConfig())
    end = tokenizer.encode(Template(source, specials=[*SPECIALS]).end_of_turn, specials=True)
    with torch.no_grad():
        for w in (model.blocks[0].attn.o.weight, model.blocks[0].mlp.down.weight, model.head.weight):
            w.zero_()
        model.norm.weight.fill_(1)
        for now, after in itertools.pairwise([*b"\nok ", *end]):
            model.head.weight[after] += 50 * model.embed.weight[now] / model.embed.weight[now].norm()
    answers = expected_answers(model, tokenizer, USER[:2], "", n_new)
    shown = b"ok " if len(end) == 1 else shown
    shown = shown[:n_new]
    assert [bytes(answer) for answer in answers] == [shown, shown]
    done = say(model, "--chat", "-n", str(n_new), "-t", "0", tokenizer=tokenizer, lines="\n".join(USER[:2]).encode())
    assert done.stdout == (shown + b"\n") * 2


def test_what_no_conversation_can_be_held_with_is_refused(say, program, tmp_path):
    model = random_model(sizes(), RouterConfig())
    say(model, "-n", "1")
    command = [program, tmp_path / "two" / "model.bin", "--chat", "-n", "2"]
    ask = lambda *words, lines=b"Hi": subprocess.run([*command, *words], input=lines, capture_output=True, check=False)
    done = ask()
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"does not know how a conversation is spelt" in done.stderr
    # A template that knows no system, and a line that is no text.
    no_system = DEFAULT.replace(
        "{{ '<|' +", "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ '<|' +"
    )
    tokenizer = tokenizer_of("byte", no_system)
    say(random_model(sizes(vocab_size=259), RouterConfig()), "-n", "1", tokenizer=tokenizer)
    assert ask().returncode == 0
    assert b"have no system message" in ask("-p", "Be brief.").stderr
    assert b"not UTF-8" in ask(lines=b"\xff258 ").stderr


def test_a_tokenizer_says_why_it_has_no_chat():
    assert export_c.why_no_chat(train(TokenizerConfig("byte"), [])) == "the tokenizer has no chat template"
    counted = tokenizer_of("byte", DEFAULT + "{{ messages | length }}")
    assert "does not write turn after turn" in export_c.why_no_chat(counted)
    other = tokenizer_of("byte", DEFAULT)
    other.pattern = r"\w+|\W"
    assert export_c.why_no_chat(other) == "run.c does not split text as the tokenizer does"
