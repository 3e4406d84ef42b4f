"""Claims about what stands around turns: put together it is what Jinja writes, and templates of another kind are
refused."""

import pytest

from moe.convert.turns import Around, around, spelt
from moe.data.chat import DEFAULT, Template, tokenize
from moe.data.tokenizer import END_OF_TEXT, Tokenizer
from moe.errors import BadInput

# ChatML with a system message that is there if none is given, and end-of-turn tokens of its own.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>{{ '\n' }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns without names, and no system message.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif message.role == 'user' %}[Q]{{ message.content }}[A]{% else %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"default": DEFAULT, "chatml": CHATML, "plain": PLAIN}
SPECIALS = {END_OF_TEXT: 256, "<|im_start|>": 257, "<|im_end|>": 258}
BYTES = Tokenizer("byte", r"(?s).", {bytes([value]): value for value in range(256)}, SPECIALS)


def template(source):
    return Template(source, "its template", [*SPECIALS])


def test_parts_are_what_a_template_writes_between_the_words():
    assert around(template(PLAIN)) == Around("[Q]", "", "", "[A]", "<|endoftext|>", "[Q]")
    assert around(template(CHATML)) == Around(
        before_user="<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n",
        before_system="<|im_start|>system\n",
        behind_system="<|im_end|>\n<|im_start|>user\n",
        before_reply="<|im_end|>\n<|im_start|>assistant\n",
        behind_reply="<|im_end|>",
        before_next="\n<|im_start|>user\n",
    )


@pytest.mark.parametrize("source", TEMPLATES)
def test_ids_put_together_from_the_parts_are_those_of_the_rendered_conversation(source):
    system, words = "You are brief.", ["What is 2 + 3?", "5", "And 1 more? ", " 6!", "é"]
    for says in (None, system):
        if says and source == "plain":
            continue
        told, messages = around(template(TEMPLATES[source])), [{"role": "system", "content": system}] * bool(says)
        messages += [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
        text = told.before_system + system + told.behind_system if says else told.before_user
        for i, word in enumerate(words):
            text += word + (told.behind_reply + told.before_next if i % 2 else told.before_reply)
        rendered = template(TEMPLATES[source]).render(messages, reply=True)
        assert BYTES.encode(text, specials=True) == tokenize(rendered, BYTES).ids


def test_special_tokens_are_spelt_by_their_ids():
    parts = spelt(around(template(CHATML)), BYTES).split(b"\0")
    assert parts[3:] == [b"\xff258 \n\xff257 assistant\n", b"\xff258 ", b"\n\xff257 user\n", b""]
    assert spelt(around(template(PLAIN)), BYTES).split(b"\0")[:3] == [b"[Q]", b"", b""]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("{{ message.content + '<|end|>' }}", "{{ message.content | trim + '<|end|>' }}"), "as it is given"),
        (("{{ '\n' }}", "{{ loop.index }}"), "does not write turn after turn"),
        (("{% endfor %}", "{% endfor %}{{ messages | length }}"), "does not write turn after turn"),
        (("{% endgeneration %}{% generation %}", ""), "does not mark an answer and its end apart"),
        (("{% generation %}{{ message.content }}", "{% generation %}so {{ message.content }}"), "apart"),
    ],
)
def test_a_template_that_is_not_made_of_parts_is_refused(changed, message):
    assert changed[0] in DEFAULT
    with pytest.raises(BadInput, match=f"its template .*{message}"):
        around(template(DEFAULT.replace(*changed)))
