"""Conversations as text: messages, rendered by a chat template, and which parts of it are the assistant's own words.

A template is Jinja in the dialect of transformers (`messages`, `add_generation_prompt`, `eos_token`,
`raise_exception`). What stands between `{% generation %}` and `{% endgeneration %}` is what a model learns to say, and
each such part is tokenized apart: no token spans the join, so that a prompt has the same tokens in training as in
generation. Two parts side by side do that too: DEFAULT's end of a turn always is the same tokens. A template is code of
strangers: it runs in Jinja's sandbox, and can neither read files nor reach Python's objects.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from moe.data.tokenizer import END_OF_TEXT, Tokenizer
from moe.data.unreadable import BadDocument, check_unicode
from moe.errors import BadInput

# Markers that are ordinary text, so that any tokenizer has them, also one without special tokens to spare.
DEFAULT = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% generation %}{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OPEN, CLOSE = "\ue000", "\ue001"  # around a part that is learnt, while a template renders: of no script
LONGEST = 10_000_000  # characters that a template may multiply or pad into being
Message = dict[str, str]  # role and content


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [from, to) of the characters that are learnt, in order


class _Generation(Extension):
    """The tag `{% generation %}`, which marks its block."""

    tags = {"generation"}  # noqa: RUF012 — as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a text cannot be multiplied without end either."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else abs(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > LONGEST:
            raise SecurityError(f"{operator} with a result beyond {LONGEST:,}")
        return super().call_binop(context, operator, left, right)


class Template:
    """A chat template, ready to render."""

    def __init__(
        self, source: str, where: str = "the chat template", specials: Sequence[str] = (), eos_token: str = END_OF_TEXT
    ) -> None:
        """`where` it is from, for messages; `specials`: the tokenizer's special tokens, `eos_token` among them, which
        no message may spell. Raises `BadInput` for one that is not Jinja or marks nothing to learn."""
        self.source, self.where, self.specials, self.eos_token = source, where, {*specials, eos_token}, eos_token
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        sandbox.globals["raise_exception"] = _refuse
        try:
            self._template = sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(f"{where} is no Jinja: {error.message} (line {error.lineno}).") from error
        if "generation" not in source:
            raise BadInput(
                f"{where} has no {{% generation %}} block: put one around what the assistant says, its end of turn too."
            )

    def render(self, messages: Sequence[Message], reply: bool = False) -> Rendered:
        """The conversation as text; with `reply` the assistant is to speak next. Raises `BadInput` for a template that
        fails, or tries what the sandbox forbids."""
        try:
            marked = self._template.render(
                messages=list(messages), add_generation_prompt=reply, eos_token=self.eos_token, bos_token=""
            )
        except SecurityError as error:
            raise BadInput(f"{self.where} tries what a template may not: {error}.") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise BadInput(f"{self.where} fails: {' '.join(str(error).split()) or type(error).__name__}.") from error
        return _unmarked(marked, self.where)

    @functools.cached_property
    def end_of_turn(self) -> str:
        """What the assistant ends its turn with: of what it learns to say, the part behind its words. Raises `BadInput`
        for a template that marks none."""
        probe = "word"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
        text, spans = self.render(messages)
        said = "".join(text[start:stop] for start, stop in spans)
        end = said.partition(probe)[2]
        if not end:
            raise BadInput(
                f"{self.where} marks no end of the assistant's turn: put it inside {{% generation %}}, or a model "
                "would never learn to stop."
            )
        return end


def _refuse(message: str) -> None:
    """What a template calls for messages that it does not take."""
    raise jinja2.TemplateError(message)


def _unmarked(marked: str, where: str) -> Rendered:
    """The text without its marks. Raises `BadInput` for marks within marks."""
    text, *blocks = marked.split(OPEN)
    spans = []
    for block in blocks:
        inside, close, after = block.partition(CLOSE)
        if not close or CLOSE in after:
            raise BadInput(f"{where} has a {{% generation %}} block within another: accepted are blocks side by side.")
        if inside:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, tuple(spans))


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text in tokens: ids, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


def tokenize(rendered: Rendered, tokenizer: Tokenizer) -> Tokens:
    """Ids of a conversation, each part apart; special tokens that the template spells are themselves."""
    ids: list[int] = []
    learnt: list[bool] = []
    for start, stop, is_learnt in parts(rendered):
        piece = tokenizer.encode(rendered.text[start:stop], specials=True)
        ids += piece
        learnt += [is_learnt] * len(piece)
    return Tokens(ids, learnt)


def parts(rendered: Rendered) -> list[tuple[int, int, bool]]:
    """The text's parts in order: from, to, and whether it is learnt."""
    cuts, place = [], 0
    for start, stop in rendered.spans:
        cuts += [(place, start, False)] * (start > place) + [(start, stop, True)]
        place = stop
    return cuts + [(place, len(rendered.text), False)] * (len(rendered.text) > place)


def messages_of(row: Any, where: str, specials: Iterable[str] = (END_OF_TEXT,)) -> list[Message]:
    """The messages of a JSONL row: a list of role and content under `messages`, or a `prompt` and its `completion`.
    Raises `BadDocument` for a row that is neither, an empty answer, one without any, and a message that spells one of
    the tokenizer's `specials`, with which a text could pretend to be a turn."""
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row, dict) and {"prompt", "completion"} <= row.keys():
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    else:
        what = "must be an object with messages (a list of role and content), or with prompt and completion"
        raise BadDocument(where, what, "that are no conversation")
    for number, message in enumerate(messages):
        _check(message, f"{where}, message {number}", specials)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadDocument(where, "has no message of the assistant, and so nothing to learn", "without an answer")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check(message: Any, where: str, specials: Iterable[str]) -> None:
    """One message. Raises `BadDocument`."""
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadDocument(where, "must have a role and a content that are strings", "with a message that is none")
    if not content.strip():
        kind = "answer" if role == "assistant" else "message"
        raise BadDocument(where, f"is an empty {kind}", f"with an empty {kind}")
    check_unicode(content, where, "")
    for text in (OPEN, CLOSE, *specials):
        if text in content + role:
            raise BadDocument(where, f"spells {text!r}, which has a meaning of its own here", "with a special token")


def template_of(path: str, tokenizer: Tokenizer | None) -> Template:
    """The template in a file; without one the tokenizer's own, if it has one; else DEFAULT. `tokenizer`: None for one
    that is still to be learnt. Raises `BadInput` for a file that cannot be read, and as `Template`."""
    specials = tokenizer.specials if tokenizer else {}
    eos_token = next((text for text, token in specials.items() if tokenizer and token == tokenizer.eot), END_OF_TEXT)
    source, where = (tokenizer.template if tokenizer else None) or DEFAULT, "the tokenizer's chat template"
    if path:
        try:
            source, where = Path(path).expanduser().read_text(encoding="utf-8"), f"data.template={path}"
        except (OSError, ValueError) as error:
            raise BadInput(f"data.template={path} cannot be read: {error}.") from error
    return Template(source, where, [*specials], eos_token)
