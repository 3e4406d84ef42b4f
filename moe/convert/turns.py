"""A chat template as what stands around its turns, for a program that has no Jinja.

A template is rendered with words of no meaning, and what is between them is kept: a conversation is then those parts,
with other words in their places. That is so for templates that write turn after turn. One that does something else
(cuts the words' spaces, says how many turns there are) is refused: what is put together would not be its own.
"""

import re
from typing import NamedTuple

from moe.data.chat import Message, Template
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput

WORDS = (" ¿system? ", " ¿one? ", " ¿reply? ", " ¿two? ")  # with spaces, which some templates cut


class Around(NamedTuple):
    """What stands around the turns of a conversation, in its template's own spelling."""

    before_user: str  # the first turn, where the system says nothing
    before_system: str  # "": no message of the system is known to the template
    behind_system: str  # and before the user's first turn
    before_reply: str  # behind a turn of the user's
    behind_reply: str  # with which the assistant's turn ends
    before_next: str  # the user's turn behind it


def around(template: Template) -> Around:
    """The parts of a template. Raises `BadInput` for one whose conversations are not put together from parts."""
    system, one, reply, two = WORDS
    # Parts, each from the shortest conversation that has it.
    before_user, before_reply = _split(template, [one], False)
    try:
        before_system, behind_system, _ = _split(template, [system, one], True)
    except BadInput:
        before_system = behind_system = ""
    between = _split(template, [one, reply, two], False)[2]
    behind_reply = template.end_of_turn
    if not between.startswith(behind_reply):
        raise BadInput(f"{template.where} does not end an answer as it says: what is learnt does not follow the words.")
    told = Around(
        before_user, before_system, behind_system, before_reply, behind_reply, between.removeprefix(behind_reply)
    )
    # Tokens must not span the end of an answer, by which a program knows it.
    text, spans = template.render(_messages([one, reply, two], False))
    learnt = [text[start:stop] for start, stop in spans]
    apart = learnt == [reply, behind_reply] or behind_reply.startswith(tuple(template.specials))
    if not apart or "".join(learnt) != reply + behind_reply:
        raise BadInput(
            f"{template.where} does not mark an answer and its end apart: put each into a {{% generation %}} block of "
            "its own, or end a turn with a special token."
        )
    # Longer ones, put together.
    for words in (
        [one, reply, two, reply, one],
        [one, reply, "x"],
        *([[system, one, reply, two]] * bool(before_system)),
    ):
        _check(template, told, words)
    return told


def spelt(around: Around, tokenizer: Tokenizer) -> bytes:
    """The parts as run.c reads them: each ends with a zero byte, and a special token is the byte 255, its id and a
    space."""
    specials = sorted(tokenizer.specials, key=len, reverse=True)
    pattern = re.compile(b"|".join(re.escape(special.encode()) for special in specials))
    number = lambda special: b"\xff%d " % tokenizer.specials[special[0].decode()]
    return b"".join(pattern.sub(number, part.encode().replace(b"\0", b"")) + b"\0" for part in around)


def _check(template: Template, told: Around, words: list[str]) -> None:
    """Raise `BadInput` where a conversation is not what its parts make."""
    rendered = template.render(_messages(words, words[0] == WORDS[0]), reply=True)
    text, rest = told.before_user, words
    if words[0] == WORDS[0]:
        text, rest = told.before_system + words[0] + told.behind_system, words[1:]
    for number, word in enumerate(rest):
        text += word + ((told.behind_reply + told.before_next) if number % 2 else told.before_reply)
    if rendered.text != text:
        raise BadInput(
            f"{template.where} does not write turn after turn: a conversation of {len(words)} messages is not what its "
            "parts make, and run.c has no Jinja."
        )


def _split(template: Template, words: list[str], system: bool) -> list[str]:
    """What stands before, between and behind these words."""
    text, told = template.render(_messages(words, system), reply=True).text, []
    for word in words:
        before, given, text = text.partition(word)
        if not given:
            raise BadInput(f"{template.where} does not write a message as it is given, and run.c has no Jinja.")
        told.append(before)
    return [*told, text]


def _messages(words: list[str], system: bool) -> list[Message]:
    roles = ["system"] * system + ["user", "assistant"] * len(words)
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
