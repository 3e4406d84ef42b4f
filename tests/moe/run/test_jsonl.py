"""Lines appended and files replaced: whole or not at all."""

import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"", b"\x00\xff\x00", b"5", b"[1]", b"null", b"[" * 100_000])
def test_any_other_damaged_line_is_refused_by_file_and_number_and_nothing_is_dropped(damage, tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [b'{"step": 1}', damage, b'{"step": 3}', b'{"step": 4}', b""]
    path.write_bytes(b"\n".join(lines))
    for read in (jsonl.read_lines, lambda path: jsonl.keep_until(path, 9), lambda path: jsonl.keep_until(path, -1)):
        with pytest.raises(BadInput, match=r"lines\.jsonl, line 2 is damaged"):
            read(path)
    assert path.read_bytes() == b"\n".join(lines)
    path.write_bytes(b"\n".join([lines[0], damage, b""]))  # the last one, but not cut: its end is there
    with pytest.raises(BadInput, match="line 2 is damaged"):
        jsonl.read_lines(path)


def test_a_line_without_its_step_is_refused_when_steps_are_dropped(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(BadInput, match="line 2 is damaged: it has no step"):
        jsonl.keep_until(tmp_path / "lines.jsonl", 1)


def test_lines_that_stay_are_kept_byte_for_byte(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step":1,  "loss": 1.50}\n{"step": 2}')
    jsonl.keep_until(path, 2)
    assert path.read_text() == '{"step":1,  "loss": 1.50}\n{"step": 2}\n'


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_deleted_while_it_is_written_is_made_again_with_all_its_lines(whole_folder, tmp_path):
    lines = jsonl.Lines(tmp_path / "below" / "lines.jsonl")
    lines.write({"step": 1})
    shutil.rmtree(tmp_path / "below") if whole_folder else lines.path.unlink()
    lines.write({"step": 2})
    lines.path.unlink()
    lines.keep()
    lines.close()
    assert jsonl.read_lines(lines.path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_another_took_the_place_of_stops_the_run(tmp_path):
    lines = jsonl.Lines(tmp_path / "lines.jsonl")
    lines.write({"step": 1})
    jsonl.write_atomically(lines.path, "edited")
    with pytest.raises(BadInput, match="was replaced by another file"):
        lines.write({"step": 2})
    assert lines.path.read_text() == "edited"


def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    lines = jsonl.Lines(Path("/dev/full"))
    with pytest.raises(BadInput, match="cannot be written"):
        lines.write({"step": 1})


@pytest.mark.parametrize(("content", "what"), [(b"\xff\xfe\n", ", line 1 is damaged"), (None, " cannot be read")])
def test_a_file_that_cannot_be_read_or_written_is_one_sentence(content, what, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content) if content else path.mkdir()
    with pytest.raises(BadInput, match=rf"lines\.jsonl{what}"):
        jsonl.read_lines(path)
    if not content:
        with pytest.raises(BadInput, match=r"lines\.jsonl cannot be written \(Is a directory\)"):
            jsonl.Lines(path)


def test_where_nothing_can_be_written_the_sentence_is_about_the_file(tmp_path, monkeypatch):
    def read_only(*arguments, **keywords):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    with pytest.raises(BadInput, match=r"file cannot be written \(Read-only file system\)"):
        jsonl.write_atomically(tmp_path / "file", "new")


def test_a_file_is_utf8_whatever_the_locale(tmp_path):
    jsonl.write_atomically(tmp_path / "file", "± –")
    assert (tmp_path / "file").read_bytes() == "± –".encode()


def test_lines_are_read_as_records_and_one_that_is_none_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert jsonl.read_records(Pair, path) == []
    path.write_text('{"a": 1, "b": 2.5}\n{"a": 3, "b": null, "later": 1}\n')
    (first, second) = jsonl.read_records(Pair, path)
    assert first == Pair(1, 2.5)
    assert second.a == 3
    path.write_text('{"a": 1, "b": 2.5}\n{"a": 3}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 2"):
        jsonl.read_records(Pair, path)


@dataclass
class Pair:
    a: int
    b: float


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(1, 12))
def test_a_file_that_grows_is_read_once_line_by_line_however_it_is_cut(cuts, n_lines):
    text = "".join(f'{{"step": {step}, "name": "é"}}\n' for step in range(n_lines)).encode()
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        growing = jsonl.Growing(path)
        assert not growing.is_another()
        assert list(growing.new()) == []
        found = []
        for begin, end in itertools.pairwise(bounds):
            with path.open("ab") as file:
                file.write(text[begin:end])
            assert growing.is_another() == (begin == 0)
            found += growing.new()
            assert len(found) == path.read_bytes().count(b"\n")  # a line without its end may be half of one
        assert [line["step"] for line in found] == list(range(n_lines))


def test_a_file_that_is_written_anew_is_read_anew_and_damage_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    growing = jsonl.Growing(path)
    assert growing.is_another()
    assert len(list(growing.new())) == 3
    jsonl.keep_until(path, 2)  # as a run does that goes on from a checkpoint
    with path.open("a") as file:
        file.write('{"step": 3, "again": true}\n{"step": 4}\n')
    assert list(growing.new()) == []  # of another file than was asked for
    assert growing.is_another()
    assert [line["step"] for line in growing.new()] == [1, 2, 3, 4]
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(BadInput, match=r"lines\.jsonl, line 5 is damaged: '{\\n' is no JSON object"):
        list(growing.new())
    path.unlink()
    assert growing.is_another()
    assert list(growing.new()) == []
