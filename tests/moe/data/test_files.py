"""Claims about moe/data/files.py: nothing is read that is too much, and no path is a traceback."""

import gzip
import os
import socket
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from moe.config.data import DataConfig
from moe.data import files
from moe.data.files import BadDocument, blocks, lines, text_files
from moe.data.prepare import prepare
from moe.data.sources import documents
from moe.data.unreadable import Unreadable
from moe.errors import BadInput
from tests.moe.data.small_corpora import AS_IT_IS, BYTE, silent


def skipping(path: Path, **settings) -> tuple[list[str], Unreadable]:
    """The texts below a path, and what could not be read."""
    tally = Unreadable("skip")
    cfg = DataConfig(name="text", path=str(path), on_error="skip", **settings)
    return [d.text for d in documents(cfg, path, tally)], tally


# ---------------------------------------------------------------- too much


def bomb(path: Path, size: int) -> Path:
    """A file of a few kilobytes that holds `size` times x."""
    pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(pack(b"x" * size))
    return path


@pytest.mark.parametrize("name", ["a.txt.zst", "a.html.zst", "a.jsonl.zst", "a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("max_mb", [0.1, 0])
def test_a_small_file_that_holds_a_large_text_takes_no_more_than_what_is_asked_for(tmp_path, name, max_mb, monkeypatch):
    monkeypatch.setattr(files, "HARMLESS", 10**7)
    bomb(tmp_path / name, 150_000_000 if name.endswith(".zst") else 20_000_000)
    (tmp_path / "b.txt").write_text("good")
    tracemalloc.start()
    texts, tally = skipping(tmp_path, max_mb=max_mb, max_document_mb=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert "good" in texts or (name.startswith("a.txt") and max_mb)  # whose hash is before b.txt's: it fills the domain
    assert sum(map(len, texts)) <= 100_000 + 4
    if not max_mb or ".txt" not in name:
        assert tally.counts == {"too large": 1}


def test_a_line_that_is_too_long_is_passed_over_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 7)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n" + b"x" * 100 + b"\n\n  \ntwo\n" + b"y" * 50 + b"\n" + b"z" * 50)
    assert list(lines(path, 40)) == [(1, b"one"), (2, None), (5, b"two"), (6, None), (7, None)]
    assert list(lines(path)) == list(lines(path, 100))
    assert list(lines(path))[1] == (2, b"x" * 100)


def test_a_file_that_breaks_off_keeps_the_lines_before(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rows = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(500))
    path.write_bytes(gzip.compress(rows)[:-500])
    texts, tally = skipping(path)
    assert 400 < len(texts) < 500
    assert tally.counts == {"truncated or damaged": 1}


# ---------------------------------------------------------------- paths


def test_a_path_that_is_no_file_is_counted_and_not_waited_for(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to(".")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.txt"))
    texts, tally = skipping(tmp_path)
    listener.close()
    assert texts == ["good"]
    assert tally.counts == {"unreadable path": 5}
    told = str(tally)
    assert "pipe.txt is a named pipe" in told
    assert "gone.txt is a link to what is not there" in told
    assert "self.txt cannot be read: Too many levels" in told
    assert "device.txt is a device" in told
    for alone in ("pipe.txt", "gone.txt"):
        with pytest.raises(BadInput, match=rf"1 document cannot be read .*{alone} is"):
            list(documents(DataConfig(name="text", path=str(tmp_path / alone)), tmp_path))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "SELF"])
@pytest.mark.parametrize("name", ["text", "huggingface"])
def test_a_path_that_no_system_opens_is_refused_in_a_sentence(tmp_path, path, name):
    (tmp_path / "self").symlink_to("self")
    path = str(tmp_path / "self") if path == "SELF" else path
    with pytest.raises(BadInput, match=r"data\.path=.* cannot be read: .*\.$"):
        prepare(DataConfig(name=name, path=path, cache=str(tmp_path)), BYTE, silent)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "good.txt").write_text("good")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    texts, tally = skipping(tmp_path)
    assert texts == ["good"]
    assert f"{tmp_path}/shut cannot be listed: Permission denied" in str(tally)


def test_links_that_go_in_circles_give_each_file_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    for i in range(6):  # each path of links is another name: 6 to the power of 40 of them
        (tmp_path / "a" / f"up{i}").symlink_to("..")
    for pattern in ("**/*.txt", "a/**/x.txt", "**/b/*.txt", "**/**/[xy].t?t", "**"):
        assert skipping(tmp_path / pattern)[0] == ["x"], pattern
    assert [file.name for file in text_files(str(tmp_path))[1]] == ["x.txt"]
    with pytest.raises(BadInput, match="matches no file"):
        skipping(tmp_path / "b/**/x.txt")


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/te\xe9xt"))
    folder.mkdir()
    for i in range(30):
        (folder / f"caf\udce9 {i}.txt").write_text(f"text number {i}")
    (folder / "bad\udce9.txt").write_bytes(b"\xff")
    said: list[str] = []
    cfg = DataConfig(name="text", path=str(folder), cache=str(tmp_path), val_fraction=0.3, clean=AS_IT_IS)
    cfg.on_error = "skip"
    dataset = prepare(cfg, BYTE, said.append)
    assert dataset.domains == ["te\\xe9xt"]
    "\n".join([*said, *dataset.domains, *dataset.manifest["unreadable"]["places"]]).encode()
    assert "bad\\xe9.txt" in dataset.manifest["unreadable"]["places"][0]


def test_damage_is_a_bad_document(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"no frame")
    with pytest.raises(BadDocument, match="is truncated or damaged"):
        list(blocks(tmp_path / "a.zst"))
