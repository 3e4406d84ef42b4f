"""Claims about what reaches a person: outputs that do not fail, and text that moves no cursor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.run import terminal

ROOT = Path(__file__).parents[3]


def test_control_characters_are_pictures_and_the_rest_is_as_it_was():
    assert terminal.printable("\x1b[2J\x07\r\x7f") == "␛[2J␇␍␡"
    assert terminal.printable("a\tb\nc") == "a␉b␊c"
    assert terminal.printable("a\tb\nc\x00", lines=True) == "a\tb\nc␀"
    assert terminal.printable("\x9b1m \u202e \u2028 \udcff") == "\ufffd1m \ufffd \ufffd \ufffd"
    assert terminal.printable("naïve 漢字 😀 👩‍👩‍👧") == "naïve 漢字 😀 👩‍👩‍👧"


def test_a_line_is_said_at_once_and_as_one_line(capsys):
    terminal.say("run: a\nb\x1b")
    assert capsys.readouterr().out == "run: a␊b␛\n"


def test_what_comes_after_an_error_is_dropped_and_the_error_kept():
    reader, writer = os.pipe()
    stream = terminal.outlet(writer)
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    assert stream.buffer.raw.lost is None
    os.close(reader)
    for _ in range(3):
        print("unread", file=stream, flush=True)
    assert isinstance(stream.buffer.raw.lost, BrokenPipeError)
    os.close(writer)


def test_only_outlets_are_known_to_be_lost(capsys):
    assert terminal.lost() is None


CHILD = """
import os, sys
from moe.run import terminal
terminal.protect()
print("é ▁", flush=True)
error = terminal.lost()
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2} {error and error.errno}")
"""


@pytest.mark.parametrize(
    ("redirect", "written", "said"),
    [("| cat", "None", "? ?\n"), (">/dev/full", "28", ""), (">&-", "9", ""), (">&- 2>&- <&-", "9", "")],
)
def test_protected_outputs_do_not_fail_and_closed_ones_go_to_no_file(redirect, written, said, tmp_path):
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", CHILD, str(tmp_path / "file")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert (tmp_path / "file").read_text() == f"True {written}"
