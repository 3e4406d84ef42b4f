"""Claims about what a person sees while merges are learned."""

import io
import logging
import os
import random
import re
import signal
import sys
from collections.abc import Iterator

import pytest

from moe.config.data import TokenizerConfig
from moe.data import learning
from moe.data.tokenizer import train

RNG = random.Random(0)
TEXTS = ["".join(RNG.choices("abcdefghij ", k=60)) for _ in range(300)]
BPE = TokenizerConfig("bpe", 457)  # 200 merges, and one token for the end


class Terminal(io.StringIO):
    """Text that goes to a terminal, kept."""

    def isatty(self) -> bool:
        return True


def test_in_a_pipe_there_is_a_line_before_and_one_after_with_the_time(capsys):
    train(BPE, TEXTS, print)
    before, after = capsys.readouterr().out.splitlines()
    assert before == "tokenizer: learning 200 merges"
    assert re.fullmatch(r"tokenizer: learned from 300 texts in \d+\.\d s", after)


def test_on_a_terminal_a_bar_counts_to_the_last_merge_and_goes(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    said: list[str] = []
    train(BPE, TEXTS, said.append)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stdout.getvalue())
    counts = [int(n) for n in re.findall(r"tokenizer: merging .*?(\d+)/200", shown)]
    assert counts == sorted(counts)
    assert counts[-1] == 200
    assert len(set(counts)) > 50
    assert sys.stdout.getvalue().endswith("\x1b[2K"), "its line is cleared"
    assert len(said) == 2
    assert not any(isinstance(handler, learning.Bar) for handler in logging.getLogger(learning.LOGGER).handlers)


def test_nothing_is_shown_to_whom_does_not_ask(capsys):
    shown = train(BPE, TEXTS)
    assert capsys.readouterr() == ("", "")
    assert shown.fingerprint == train(BPE, TEXTS, lambda line: None).fingerprint


@pytest.mark.parametrize("where", ["between two texts", "at the end"])
def test_ctrl_c_is_not_lost(where):
    def texts() -> Iterator[str]:
        yield from TEXTS
        os.kill(os.getpid(), signal.SIGINT)
        if where == "between two texts":
            yield "never"
            pytest.fail("another text was asked for")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(BPE, texts())
    assert signal.getsignal(signal.SIGINT) is before
