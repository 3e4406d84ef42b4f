"""Claims about documents that cannot be read: each is counted, by reason and place, and no other is lost by it."""

import json
from pathlib import Path

import pytest

from moe.config.data import CleanConfig, DataConfig
from moe.data.prepare import prepare
from moe.data.sources import documents
from moe.data.unreadable import BadDocument, Unreadable
from moe.errors import BadInput
from tests.moe.data.small_corpora import AS_IT_IS, BYTE, silent

GOOD = [f"a good line of its own, number {i}" for i in range(20)]
# What a line says instead, and what it is counted as.
BAD = {
    b'{"text": null}': "with 'text' null",
    b'{"body": "x"}': "without 'text'",
    b"{}": "without 'text'",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "cut': "not JSON",
    b'{"text": "a\0b"}': "with NUL bytes",
    b'{"text": 5}': "with 'text' of type int",
    b'["text"]': "of type list instead of an object",
    b"null": "of type NoneType instead of an object",
    b'{"text": "\\ud800"}': "with half a surrogate pair",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "with too long a number",
    b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}": "nested too deeply",
    b'{"text": "' + b"x" * 60_000 + b'"}': "too large",
}


def corpus(folder: Path, *bad: bytes) -> Path:
    """A JSONL file with each of `bad` between good lines, and a good line at the end."""
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    lines = [line for pair in zip(good, bad, strict=False) for line in pair] + good[len(bad) :]
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=BAD.values())
def test_a_bad_document_is_skipped_and_counted(tmp_path, line, reason):
    tally = Unreadable("skip")
    cfg = DataConfig(name="text", path=str(corpus(tmp_path, line)), max_document_mb=0.06)
    assert [d.text for d in documents(cfg, tmp_path, tally)] == GOOD
    assert tally.counts == {reason: 1}
    assert f"{tmp_path}/rows.jsonl, line 2" in tally.places[0]


def test_all_bad_documents_are_read_and_told_before_the_corpus_is_refused(tmp_path):
    path = corpus(tmp_path, *list(BAD)[:3], *list(BAD)[:4])
    with pytest.raises(BadInput) as caught:
        list(documents(DataConfig(name="text", path=str(path)), tmp_path))
    message = str(caught.value)
    assert "7 documents cannot be read (4 without 'text', 2 with 'text' null, 1 not UTF-8)" in message
    assert all(f"rows.jsonl, line {line}" in message for line in (2, 4, 6, 8, 10))
    assert "line 12" not in message
    assert "and 2 more" in message
    assert "data.on_error=skip" in message


def test_a_corpus_of_which_nothing_is_left_is_refused_although_bad_documents_are_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": null}\n')
    with pytest.raises(BadInput, match=r"holds no text, and 1 document cannot be read \(1 with 'text' null\)"):
        list(documents(DataConfig(name="text", path=str(tmp_path), on_error="skip"), tmp_path))


def test_what_was_left_out_is_in_the_manifest_and_told_each_time(tmp_path):
    path = corpus(tmp_path / "text", b"null", b"{}")
    (path.parent / "page.html").write_text("<![broken[ page")
    cfg = DataConfig(name="text", path=str(path.parent), cache=str(tmp_path / "cache"), val_fraction=0.3)
    cfg.on_error, cfg.clean = "skip", CleanConfig(min_chars=0, near=0.0)
    first, again = [], []
    dataset = prepare(cfg, BYTE, first.append)
    assert dataset.manifest["unreadable"]["counts"] == {
        "of type NoneType instead of an object": 1,
        "without 'text'": 1,
        "not HTML": 1,
    }
    assert prepare(cfg, BYTE, again.append).sha256 == dataset.sha256
    told = [line for line in again if "3 documents cannot be read" in line]
    assert len(told) == 1
    assert told[0] in first
    cfg.on_error = "refuse"  # the folder is there, and yet it is not what was asked for
    with pytest.raises(BadInput, match="3 documents cannot be read"):
        prepare(cfg, BYTE, silent)


def test_a_corpus_without_fault_is_the_same_whatever_is_done_with_bad_documents(tmp_path):
    path = corpus(tmp_path / "text")
    cfg = DataConfig(name="text", path=str(path), cache=str(tmp_path), val_fraction=0.3, clean=AS_IT_IS)
    dataset = prepare(cfg, BYTE, silent)
    assert "unreadable" not in dataset.manifest
    cfg.on_error = "skip"
    assert prepare(cfg, BYTE, silent).folder == dataset.folder


def test_a_tally_survives_the_manifest():
    tally = Unreadable("skip")
    for i in range(9):
        tally.add(BadDocument(f"file {i}", "is bad", "bad"))
    again = Unreadable.of(json.loads(json.dumps(tally.record())), "refuse")
    assert str(again) == str(tally)
    assert len(again.places) == 5
    assert Unreadable.of({}, "refuse").check() is None
