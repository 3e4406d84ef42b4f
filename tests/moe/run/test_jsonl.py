"""Lines appended and files replaced: whole or not at all."""

import os
from pathlib import Path

import pytest

from moe.errors import BadInput
from moe.run import jsonl
from tests.small_runs import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    jsonl.write_atomically(path, "old")

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="cannot be written"):
        jsonl.write_atomically(path, "new")
    assert files(tmp_path).keys() == {"file"}
    assert path.read_text() == "old"


def test_lines_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    lines = jsonl.Lines(tmp_path / "below" / "lines.jsonl")
    lines.write({"step": 1})
    assert jsonl.read_lines(lines.path) == [{"step": 1}]
    lines.close()


def test_a_last_line_cut_short_is_left_out_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 1e-17}\n{"step": 3, "lo')
    assert [line["step"] for line in jsonl.read_lines(path)] == [1, 2]
    jsonl.keep_until(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n'
    assert jsonl.read_lines(tmp_path / "none") == []


def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    lines = jsonl.Lines(Path("/dev/full"))
    with pytest.raises(BadInput, match="cannot be written"):
        lines.write({"step": 1})
