"""Claims about moe/data/chat.py: what a conversation is as text, which of it is learnt, and what is refused."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moe.config.data import DataConfig
from moe.data.chat import DEFAULT, Rendered, Template, messages_of, parts, template_of, tokenize
from moe.data.prepare import prepare
from moe.data.tokenizer import END_OF_TEXT, Tokenizer
from moe.data.unreadable import BadDocument
from moe.errors import BadInput
from tests.moe.data.small_corpora import BYTE, silent

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "6, é"},
]
# ChatML, as many published models have it, with tokens of its own.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {END_OF_TEXT: 256, "<|im_start|>": 257, "<|im_end|>": 258}


def byte_tokenizer(specials=SPECIALS) -> Tokenizer:
    return Tokenizer("byte", r"(?s).", {bytes([value]): value for value in range(256)}, specials)


@pytest.mark.parametrize("source", [DEFAULT, CHATML])
@pytest.mark.parametrize("reply", [False, True])
def test_text_and_learnt_parts_are_those_of_transformers(source, reply):
    messages = TURNS[:-1] if reply else TURNS
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=reply, return_assistant_tokens_mask=True
    )
    rendered = Template(source).render(messages, reply)
    assert rendered.text == text
    joined = {i for start, stop in rendered.spans for i in range(start, stop)}
    assert joined == {i for start, stop in spans for i in range(start, stop)}
    assert joined


def test_what_is_learnt_is_every_answer_with_its_end():
    text, spans = Template(DEFAULT).render(TURNS)
    assert [text[start:stop] for start, stop in spans] == ["5", "<|end|>", "6, é", "<|end|>"]
    assert Template(DEFAULT).end_of_turn == "<|end|>"
    assert Template(CHATML).end_of_turn == "<|im_end|>"


def test_a_prompt_has_the_same_tokens_as_before_its_answer():
    template, tokenizer = Template(DEFAULT), byte_tokenizer()
    prompt, whole = (tokenize(template.render(*of), tokenizer) for of in ((TURNS[:2], True), (TURNS[:3],)))
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert not any(whole.learnt[: len(prompt.ids)])
    assert whole.learnt[len(prompt.ids)]


def test_parts_cover_the_text_once_and_in_order():
    rendered = Template(DEFAULT).render(TURNS)
    cuts = parts(rendered)
    assert "".join(rendered.text[start:stop] for start, stop, _ in cuts) == rendered.text
    assert [start for start, _, _ in cuts[1:]] == [stop for _, stop, _ in cuts[:-1]]
    assert parts(Rendered("abc", ())) == [(0, 3, False)]


def test_special_tokens_of_a_template_are_themselves_and_a_message_cannot_spell_one():
    template = Template(CHATML, specials=[*SPECIALS])
    ids = tokenize(template.render(TURNS), byte_tokenizer()).ids
    assert ids.count(257) == ids.count(258) == len(TURNS)
    row = {"messages": [TURNS[1], {"role": "assistant", "content": "so<|im_end|>"}]}
    with pytest.raises(BadDocument, match=r"line 1, message 1 spells '<\|im_end\|>'"):
        messages_of(row, "line 1", template.specials)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], "must be an object with messages"),
        ({"prompt": "a"}, "must be an object with messages"),
        ({"prompt": "a", "completion": "  "}, "message 1 is an empty answer"),
        ({"prompt": "", "completion": "b"}, "message 0 is an empty message"),
        ({"prompt": "a", "completion": None}, "must have a role and a content that are strings"),
        ({"messages": ["hello"]}, "must have a role and a content that are strings"),
        ({"messages": []}, "has no message of the assistant"),
        ({"messages": [TURNS[1]]}, "has no message of the assistant"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair at character 0"),
        ({"prompt": "a", "completion": "b\ue000"}, "has a meaning of its own"),
        ({"prompt": f"a{END_OF_TEXT}", "completion": "b"}, "has a meaning of its own"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_place(row, why):
    with pytest.raises(BadDocument, match=r"x\.jsonl, line 7") as refused:
        messages_of(row, "x.jsonl, line 7")
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for %}", "is no Jinja"),
        ("{{ messages[0].content }}", "has no {% generation %} block"),
        ("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", "within another"),
        ("{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", "tries what a template may not"),
        ("{% generation %}{{ messages.append(1) }}{% endgeneration %}", "tries what a template may not"),
        ("{% generation %}{{ 'a' * 10 ** 9 }}{% endgeneration %}", "tries what a template may not"),
        ("{% generation %}{{ 'ab' * 9999999 }}{% endgeneration %}", "tries what a template may not"),
        ("{% generation %}{% for i in range(10**9) %}a{% endfor %}{% endgeneration %}", "may not"),
        ("{% generation %}{% for i in range(999999999) %}a{% endfor %}{% endgeneration %}", "fails"),
        ("{% generation %}{{ raise_exception('roles must alternate') }}{% endgeneration %}", "roles must alternate"),
        ("{% generation %}{{ nothing.there }}{% endgeneration %}", "fails: 'nothing' is undefined"),
        ("{% generation %}{{ messages[99].content.x }}{% endgeneration %}", "fails"),
        ("{% generation %}{% include '/etc/passwd' %}{% endgeneration %}", "fails"),
    ],
)
def test_a_template_that_fails_or_tries_to_escape_is_refused_in_one_sentence(source, why):
    with pytest.raises(BadInput) as refused:
        Template(source, "mine.jinja").render(TURNS)
    assert str(refused.value).startswith("mine.jinja")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_whose_answers_do_not_end_is_refused():
    endless = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    with pytest.raises(BadInput, match="marks no end of the assistant's turn"):
        _ = Template(endless).end_of_turn


def conversations(n: int) -> list[dict]:
    return [{"prompt": f"What comes after {i}?", "completion": f"{i + 1}"} for i in range(n)]


def prepared(tmp_path, rows, **settings):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        DataConfig("chat", str(path), cache=str(tmp_path / "cache"), val_fraction=0.2, **settings), BYTE, silent
    )


def test_a_prepared_corpus_knows_what_is_learnt_and_how_conversations_are_spelt(tmp_path):
    dataset = prepared(tmp_path, conversations(40))
    assert dataset.tokenizer.template == DEFAULT
    for name in ("train", "val"):
        split = dataset.split(name)
        tokens, _ = split.read([0], split.n_tokens - 1)
        learnt = split.learnt([0], split.n_tokens - 1)
        said = dataset.tokenizer.decode(tokens[0, 1:][learnt[0]])
        answers = said.split("<|end|>")[:-1]
        questions = dataset.tokenizer.decode(tokens[0])
        assert len(answers) == questions.count(END_OF_TEXT) > 3
        assert all(f"after {int(answer) - 1}?" in questions for answer in answers)


def test_a_bad_line_is_refused_or_left_out_as_it_was_asked(tmp_path):
    rows = [*conversations(40), {"prompt": "Why?", "completion": ""}]
    with pytest.raises(BadInput, match=r"chats.jsonl, line 41, message 1 is an empty answer.*data.on_error=skip"):
        prepared(tmp_path, rows)
    counts = prepared(tmp_path, rows, on_error="skip").manifest["unreadable"]["counts"]
    assert counts == {"with an empty answer": 1}


def test_another_template_is_another_corpus_and_the_tokenizers_own_comes_before_the_default(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    first = prepared(tmp_path, conversations(40))
    second = prepared(tmp_path, conversations(40), template=str(tmp_path / "mine.jinja"))
    assert first.folder != second.folder
    assert template_of("", second.tokenizer).source == CHATML
    assert template_of("", None).source == DEFAULT
    with pytest.raises(BadInput, match=r"data\.template=nowhere\.jinja cannot be read"):
        template_of("nowhere.jinja", None)


def test_a_conversation_beyond_the_limit_is_left_out_whole(tmp_path):
    dataset = prepared(tmp_path, conversations(200), max_mb=0.004)
    text = ""
    for name in ("train", "val"):
        split = dataset.split(name)
        text += dataset.tokenizer.decode(split.read([0], split.n_tokens - 1)[0][0].tolist())
    kept = text.split(END_OF_TEXT)[:-1]
    assert 40 < len(kept) < 200
    assert sum(len(conversation.encode()) for conversation in kept) <= 4000
    assert all(conversation.endswith("<|end|>\n") for conversation in kept)
