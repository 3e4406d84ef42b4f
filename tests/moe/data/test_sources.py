"""Documents from files and from `datasets`: domains, limits, and what every kind of bad input is told."""

import gzip
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import zstandard

from moe.config.data import DataConfig
from moe.data import files, sources
from moe.data.sources import Document, documents, source_fingerprint
from moe.data.unreadable import Unreadable
from moe.errors import BadInput


def read(path: Path | str, **settings) -> list[Document]:
    return list(documents(DataConfig(name="text", path=str(path), **settings), Path("unused")))


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusal(call) -> str:
    """The message of the `BadInput` that `call` raises: one line, one sentence."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is read


def test_the_folder_below_the_root_is_the_domain(tmp_path):
    root = tmp_path / "books"
    write(root / "top.txt", "at the top")
    write(root / "law" / "a.md", "a law")
    write(root / "law" / "deep" / "b.html", "<p>deep</p>")
    write(root / "law" / "ignored.pdf", b"%PDF\0")
    write(root / "law" / ".hidden" / "c.txt", "hidden")
    assert {(d.text, d.domain, d.name) for d in read(root)} == {
        ("at the top", "books", "top.txt"),
        ("a law", "law", "law/a.md"),
        ("<p>deep</p>", "law", "law/deep/b.html"),
    }


def test_chosen_domains_come_alone_each_with_all_of_its_documents(tmp_path):
    for domain in ("a", "b", "c"):
        for n in range(3):
            write(tmp_path / domain / f"{n}.txt", f"{domain}{n}")
    everything = read(tmp_path)
    assert read(tmp_path, domains=["a", "c"]) == [document for document in everything if document.domain != "b"]
    path = write(tmp_path / "rows.jsonl", lines({"text": "x", "of": "a"}, {"text": "y", "of": "b"}))
    assert [d.text for d in read(path, domain_field="of", domains=["b"])] == ["y"]


def test_a_domain_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    write(tmp_path / "a" / "1.txt", "one")
    write(tmp_path / "b" / "1.txt", "two")
    assert refusal(lambda: read(tmp_path, domains=["a", "z"])).startswith("data.domains has 'z'; the domains of data.p")
    assert refusal(lambda: read(tmp_path, domains=["z"])).endswith(": a, b.")


def test_a_single_file_is_its_own_domain(tmp_path):
    assert read(write(tmp_path / "Tiny.Book.txt.gz", "text")) == [Document("text", "Tiny.Book", "Tiny.Book.txt.gz")]


def test_a_glob_starts_at_its_first_wildcard(tmp_path):
    write(tmp_path / "x" / "a" / "1.txt", "one")
    write(tmp_path / "x" / "b" / "2.txt", "two")
    write(tmp_path / "x" / "b" / "3.md", "three")
    found = read(tmp_path / "x" / "*" / "*.txt")
    assert {(d.text, d.domain) for d in found} == {("one", "a"), ("two", "b")}
    assert {d.domain for d in read(tmp_path / "x" / "**" / "*.md")} == {"b"}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_packed_files_read_as_plain_ones(tmp_path, packing):
    text = "Grüße, 世界\n" * 3
    write(tmp_path / f"a.txt{packing}", text)
    write(tmp_path / f"b.html{packing}", "<p>x</p>")
    write(tmp_path / f"c.jsonl{packing}", lines({"text": text}))
    assert sorted(d.text for d in read(tmp_path)) == sorted([text, "<p>x</p>", text])


def test_several_zstandard_frames_read_as_one_text(tmp_path):
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(pack(b"one ") + pack(b"two"))
    assert read(tmp_path)[0].text == "one two"


def test_a_byte_order_mark_is_dropped(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")
    write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + lines({"text": "def"}).encode())
    assert sorted(d.text for d in read(tmp_path)) == ["abc", "def"]


def test_json_lines_give_text_and_domain_from_their_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"body": "x", "topic": "p"}) + "\n" + lines({"body": "y", "topic": "q"}))
    assert read(path, text_field="body", domain_field="topic") == [
        Document("x", "p", "a.jsonl:1"),
        Document("y", "q", "a.jsonl:3"),
    ]
    assert [d.domain for d in read(path, text_field="body")] == ["a", "a"]


def test_a_big_plain_text_becomes_several_documents(tmp_path):
    text = "".join(f"Paragraph {n} says something of its own.\n\n" for n in range(2000))
    found = read(write(tmp_path / "book.txt", text))
    assert "".join(d.text for d in found) == text
    assert len(found) > 8
    assert len({d.name for d in found}) == len(found)
    assert all(d.text.startswith("\n\nParagraph") for d in found[1:])


def test_characters_across_read_blocks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 3)
    text = "aé世界🙂\nsecond line\n" * 5
    write(tmp_path / "a.txt", text)
    write(tmp_path / "b.jsonl", lines({"text": text}, {"text": "last"}))
    assert sorted(d.text for d in read(tmp_path)) == sorted([text, text, "last"])


def test_the_limit_is_per_domain_and_exact(tmp_path):
    for domain in ("a", "b"):
        for n in range(20):
            write(tmp_path / domain / f"{n}.txt", "é" * 500)
    found = read(tmp_path, max_mb=0.003501)  # half a character is left out
    sizes = {domain: sum(len(d.text.encode()) for d in found if d.domain == domain) for domain in ("a", "b")}
    assert sizes == {"a": 3500, "b": 3500}
    assert len(read(tmp_path, max_mb=0)) == 40


def test_files_beyond_the_limit_are_not_read(tmp_path):
    for n in range(20):
        write(tmp_path / f"{n}.txt", "x" * 1000)
    order = [d.name for d in read(tmp_path, max_mb=0)]
    write(tmp_path / order[-1], b"\xff")  # would be refused if it were read
    assert [d.name for d in read(tmp_path, max_mb=0.005)] == order[:5]


def test_the_order_depends_on_names_below_the_root_only(tmp_path):
    for root in ("here", "there"):
        for n in range(10):
            write(tmp_path / root / "d" / f"{n}.txt", f"{n}")
    order = [d.name for d in read(tmp_path / "here")]
    assert order == [d.name for d in read(tmp_path / "there")]
    assert order != sorted(order)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"abc\0def", r"a\.txt is binary, not UTF-8 text: byte 3 is NUL"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 at byte 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9 au lait", r"a\.txt is not UTF-8 at byte 6"),
        ("a.txt", "ab世".encode()[:-1], r"a\.txt is not UTF-8 at byte 2"),
        ("a.md.gz", b"caf\xe9", r"a\.md\.gz is not UTF-8 at byte 3"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n", r"a\.txt is empty"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl, line 3 must be a JSON object .*'text', not list"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1 is not UTF-8 at byte 13"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1 has no field 'text' \(data\.text_field\); .* body, id"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: the field 'text' \(data\.text_field\) must be a string, .* int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: the field 'text' holds half a surrogate pair"),
        ("a.csv", b"x,y\n", r"data\.path=.*a\.csv matches no file of an accepted kind: \.txt, \.md"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(tmp_path, name, data, expected):
    assert re.search(expected, refusal(lambda: read(write(tmp_path / name, data))))


def test_a_bad_domain_field_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": "x"}))
    assert "no field 'kind' (data.domain_field)" in refusal(lambda: read(path, domain_field="kind"))


def test_a_position_beyond_the_first_block_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    assert "not UTF-8 at byte 11" in refusal(lambda: read(write(tmp_path / "a.txt", "aé世xyzab".encode() + b"\xff.")))
    assert "byte 9 is NUL" in refusal(lambda: read(write(tmp_path / "b" / "a.txt", b"123456789\0")))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_or_damaged_compression_is_refused(tmp_path, name):
    path = write(tmp_path / name, lines({"text": os.urandom(500).hex()}))
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[: len(whole) // 2], b"not compressed"):
        path.write_bytes(damaged)
        assert f"{path} is truncated or damaged" in refusal(lambda: read(path))


def test_a_missing_path_is_refused(tmp_path):
    assert f"data.path={tmp_path}/none does not exist" in refusal(lambda: read(tmp_path / "none"))
    assert "matches no file" in refusal(lambda: read(tmp_path / "*.txt"))
    assert "matches no file" in refusal(lambda: read(tmp_path))


def test_too_many_domains_are_refused_as_soon_as_they_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_DOMAINS", 3)
    rows = [{"text": f"{i}", "kind": f"{i}"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", lines(*rows) + "not json\n")
    assert "more than 3 domains (a.jsonl:4 is of one too many)" in refusal(lambda: read(path, domain_field="kind"))
    assert len(read(write(tmp_path / "b.jsonl", lines(*rows[:3])), domain_field="kind")) == 3


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_the_files_and_the_settings(tmp_path):
    root = tmp_path / "root"
    write(root / "a" / "1.txt", "one")
    cfg = DataConfig(name="text", path=str(root))
    seen = [source_fingerprint(cfg, tmp_path)]
    assert source_fingerprint(cfg, tmp_path / "elsewhere") == seen[0]
    write(root / "a" / "1.txt", "longer")
    seen.append(source_fingerprint(cfg, tmp_path))
    os.utime(root / "a" / "1.txt", ns=(1, 1))
    seen.append(source_fingerprint(cfg, tmp_path))
    (root / "a").rename(root / "b")
    seen.append(source_fingerprint(cfg, tmp_path))
    write(root / "b" / "2.txt", "two")
    seen.append(source_fingerprint(cfg, tmp_path))
    cfg.max_mb = 1
    seen.append(source_fingerprint(cfg, tmp_path))
    cfg.text_field = "body"
    seen.append(source_fingerprint(cfg, tmp_path))
    seen.append(source_fingerprint(DataConfig(), tmp_path))
    seen.append(source_fingerprint(DataConfig(domains=["code"]), tmp_path))
    seen.append(source_fingerprint(DataConfig(domains=["docs"]), tmp_path))
    seen.append(source_fingerprint(DataConfig(name="huggingface", path=str(root)), tmp_path))
    seen.append(source_fingerprint(DataConfig(name="huggingface", path=str(root), split="test"), tmp_path))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_reads_no_text(tmp_path):
    write(tmp_path / "a.txt", b"\xff\0 not text")
    assert source_fingerprint(DataConfig(name="text", path=str(tmp_path)), tmp_path)


def test_the_version_stands_for_what_is_read(tmp_path):
    """Where this fails, the same files give other documents: raise moe.data.sources.VERSION and add its line here."""
    write(tmp_path / "root" / "one.txt", "first line\n\n" + "A paragraph of words. " * 2000 + "\n\nlast")
    write(tmp_path / "root" / "two.jsonl", lines({"text": "é", "domain": "x"}, {"text": "b", "domain": "y"}).encode())
    write(tmp_path / "root" / "b" / "three.html.gz", "<p>three</p>")
    found = read(tmp_path / "root", domain_field="domain", max_mb=0.04)
    digest = hashlib.sha256(json.dumps([[d.text, d.domain, d.name] for d in found]).encode()).hexdigest()[:16]
    assert digest == {1: "d34bf1be6ef62462"}[sources.VERSION]


# ---------------------------------------------------------------- huggingface


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets as library  # slow to import, and only some tests need it

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return library


def load(path: Path | str, **settings) -> list[Document]:
    return list(documents(DataConfig(name="huggingface", path=str(path), **settings), Path("unused")))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_data_file_is_read(datasets, tmp_path, streaming):
    path = write(tmp_path / "data" / "rows.jsonl", lines({"body": "x", "kind": "p"}, {"body": "y", "kind": "q"}))
    found = load(path, text_field="body", domain_field="kind", streaming=streaming)
    assert [(d.text, d.domain) for d in found] == [("x", "p"), ("y", "q")]
    assert [d.domain for d in load(path, text_field="body", streaming=streaming)] == ["rows", "rows"]


def test_a_local_folder_with_splits_is_read(datasets, tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "train.csv", "text\nabc\n")
    write(folder / "test.csv", "text\nxyz\n")
    assert [(d.text, d.domain) for d in load(folder, split="test")] == [("xyz", "corpus")]


def test_streaming_stops_at_the_limit(datasets, monkeypatch):
    taken = []

    def long():
        for _ in range(1000):
            taken.append(1)
            yield {"text": "x" * 100, "kind": "ab"[len(taken) % 2]}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: long())
    assert sum(len(d.text) for d in load("some/set", max_mb=0.001)) == 1000
    assert len(taken) <= 11
    taken.clear()
    assert sum(len(d.text) for d in load("some/set", max_mb=0.001, domain_field="kind")) == 2000
    assert len(taken) <= 21


def test_remote_code_is_never_trusted(datasets, monkeypatch):
    asked = {}

    def load_dataset(**settings):
        asked.update(settings)
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("some/set", subset="en", split="validation")
    assert asked == {"path": "some/set", "name": "en", "split": "validation", "streaming": True}


def test_a_missing_field_of_a_dataset_is_refused(datasets, tmp_path):
    path = write(tmp_path / "rows.jsonl", lines({"body": "x"}))
    assert re.search(
        r"data\.path=\S+, row 0 has no field 'text' \(data\.text_field\).* body: mend", refusal(lambda: load(path))
    )


def test_rows_that_cannot_be_read_are_counted_and_the_others_read(datasets, tmp_path):
    path = write(tmp_path / "rows.csv", "text,n\nabc,1\n,2\nxyz,3\n")
    tally = Unreadable("skip")
    cfg = DataConfig(name="huggingface", path=str(path), on_error="skip")
    assert [d.text for d in documents(cfg, tmp_path, tally)] == ["abc", "xyz"]
    assert tally.counts == {"with 'text' null": 1}
    assert "row 1" in tally.places[0]


def test_an_unknown_split_or_kind_or_path_is_refused(datasets, tmp_path):
    path = write(tmp_path / "rows.jsonl", lines({"text": "x"}))
    assert "data.split=nosuch cannot be loaded" in refusal(lambda: load(path, split="nosuch"))
    assert "is not of a kind" in refusal(lambda: load(write(tmp_path / "a.xyz", "x")))
    assert "does not exist" in refusal(lambda: load(tmp_path / "none"))


def test_an_unreachable_dataset_is_refused_in_one_sentence(datasets, monkeypatch):
    def load_dataset(**settings):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "data.path=some/set cannot be reached: Couldn't reach" in refusal(lambda: load("some/set"))


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'moe-switchyard[huggingface]'" in refusal(lambda: load("some/set"))
