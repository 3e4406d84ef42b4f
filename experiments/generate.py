"""Let a trained model go on from a prompt.

    python -m experiments.generate run=runs/NAME prompt="To be, or not"
    python -m experiments.generate run=runs/NAME prompt="def main(" max_new=100 temperature=0      # greedy
    python -m experiments.generate run=runs/NAME prompt="To be" temperature=0.8 top_k=50 top_p=0.95 seed=1
    python -m experiments.generate run=runs/NAME prompt="To be" show=next           # what comes next, by which experts
    python -m experiments.generate run=runs/NAME user="What is 2 plus 3?"           # ask a run of conversations
    python -m experiments.generate run=runs/NAME prompt="To be" experts=mxfp4       # its experts in 4.25 bits a weight

The prompt is taken as the shell hands it over: quote it for the shell, 'like this' or "like this", and for nothing
else. Commas, colons, brackets, quotes, $ and line breaks in it are text. No prompt: a new document. Ctrl-C ends.

With `experts` the matrices of the routed experts are stored in that format, each rounded as it is read, and nothing
else is (moe/model/quantized.py). What they take is said on standard error, beside the text.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from moe.config.parse import OneOf
from moe.data.chat import Message, Template, messages_of, template_of
from moe.data.tokenizer import Tokenizer
from moe.data.unreadable import BadDocument
from moe.errors import BadInput
from moe.eval.answers import before, end_ids, reply_ids
from moe.eval.generate import LayerChoice, check_causal, generate, next_tokens, stream_text, token_bytes
from moe.model import dispatch, quantized
from moe.run import machine, terminal
from moe.run.load import load_run


@dataclass
class GenerateConfig:
    """What to say, and how to choose it."""

    run: str = ""  # a run's folder
    prompt: str = ""  # the text to go on from; "": a new document
    user: str = ""  # instead of a prompt: what to ask a run that was trained on conversations (data=chat)
    which: str = "best"  # best (lowest validation loss) | last | step-N
    show: str = "text"  # text | next (the most probable next tokens, and the experts)
    n: int = 10  # show=next: how many tokens
    max_new: int = 200  # tokens
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int = 50  # draw among the k most probable tokens; 0: all
    top_p: float = 0.95  # draw among the fewest tokens that have this probability together; 1: all
    seed: int = 0  # of what is drawn
    experts: str = ""  # how routed experts are stored: as int8, fp8 or mxfp4 of kernels/quantized.py; "": as they are
    trust: bool = False  # import the router of one's own (module:Class) that the run names

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run=... is needed: a run's folder, such as runs/NAME.")
        if self.prompt and self.user:
            raise BadInput("prompt=... and user=... are given: choose one.")
        if self.show not in ("text", "next"):
            raise BadInput(f"show={self.show} is not one of text, next.")
        for key in ("n", "max_new"):
            if getattr(self, key) < 1:
                raise BadInput(f"{key}={getattr(self, key)} is out of range: accepted is at least 1.")
        for key in ("temperature", "top_k"):
            if not 0 <= getattr(self, key) < float("inf"):  # also refuses nan
                raise BadInput(f"{key}={getattr(self, key)} is out of range: accepted is at least 0.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} is out of range: accepted is above 0, up to 1.")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed={self.seed} is out of range: accepted is between 0 and 2^63 - 1.")
        if self.experts:
            OneOf(*quantized.FORMATS).check("experts", self.experts)
        try:
            (self.prompt + self.user).encode()
        except UnicodeEncodeError:
            key, text = ("user", self.user) if self.user else ("prompt", self.prompt)
            raise BadInput(f"{key}={text!r} is not valid UTF-8.") from None


@cli.command("generate", GenerateConfig, verbatim=("prompt", "user", "run"))
def main(cfg: GenerateConfig) -> None:
    """Print the prompt and what the model says after it, or the table of next tokens."""
    # The run, on whatever device is here.
    device = machine.choose_device("auto")
    model, tokenizer, _ = load_run(Path(cfg.run), cfg.which, cfg.trust, cfg.experts)
    model = model.to(device)
    if stored := quantized.storage(model):
        print(stored, file=sys.stderr)
    backend = dispatch.choose("auto", device)[0]  # where it was trained need not be here
    template = chat_template(cfg, tokenizer) if cfg.user else None
    ids = reply_ids(template, asked(cfg), tokenizer) if template else tokenizer.encode(cfg.prompt)
    check_causal(model)
    # What comes next, or a text.
    if cfg.show == "next":
        tokens, choices = next_tokens(model, ids or [tokenizer.eot], cfg.n, backend=backend)
        show_next(tokenizer, tokens, choices)
        return
    new = generate(
        model,
        ids,
        cfg.max_new,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        seed=cfg.seed,
        eot=tokenizer.eot,
        backend=backend,
    )
    if template:
        new = before(new, end_ids(template, tokenizer))
    say(cfg.prompt, stream_text(tokenizer, new))


def chat_template(cfg: GenerateConfig, tokenizer: Tokenizer) -> Template:
    """How the run's conversations are spelt. Raises `BadInput` for a run that had none, and for a question that spells
    a special token."""
    if tokenizer.template is None:
        raise BadInput(
            f"user={cfg.user!r} needs a run that was trained on conversations (data=chat): {cfg.run} was not."
        )
    template = template_of("", tokenizer)
    try:
        messages_of({"messages": [*asked(cfg), {"role": "assistant", "content": "?"}]}, "user=...", template.specials)
    except BadDocument as error:
        raise BadInput(f"{error}.") from error
    return template


def asked(cfg: GenerateConfig) -> list[Message]:
    """The conversation so far."""
    return [{"role": "user", "content": cfg.user}]


def say(prompt: str, pieces: Iterator[str]) -> None:
    """Write the prompt and every piece as it comes; a terminal is shown pictures of control characters. Ctrl-C, or a
    reader that goes away, ends it. Raises `BadInput` for an output that takes no text for any other reason."""
    shown = (lambda text: terminal.printable(text, lines=True)) if sys.stdout.isatty() else str
    with contextlib.suppress(KeyboardInterrupt):
        print(shown(prompt), end="", flush=True)
        for piece in pieces:
            if terminal.lost():
                break
            print(shown(piece), end="", flush=True)
    print(flush=True)
    terminal.check()


def show_next(tokenizer: Tokenizer, tokens: list[tuple[int, float]], choices: list[LayerChoice]) -> None:
    """Two tables: next tokens, and each MoE layer's experts for the last token read."""
    rows = [(repr_token(tokenizer, token), str(token), f"{prob:.4f}") for token, prob in tokens]
    tables.print_table(("next token", "id", "probability"), rows)
    if choices:
        listed = [(str(layer), ", ".join(f"{e} ({weight:.3f})" for e, weight in experts)) for layer, experts in choices]
        print()
        tables.print_table(("layer", "experts (weight)"), listed)


def repr_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as Python writes it, so that white space shows; as bytes where it is part of a character."""
    raw = token_bytes(tokenizer, token)
    try:
        return repr(raw.decode())
    except UnicodeDecodeError:
        return repr(raw)


if __name__ == "__main__":
    main()
