"""Claims about moe/data/shards.py: they decode to what was packed, and every way they can be damaged is refused, with
the file named, before a token is used."""

import hashlib
import json
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moe.data.prepare
import moe.data.shards
from moe.config.data import CleanConfig, DataConfig, TokenizerConfig
from moe.data.loader import Loader
from moe.data.prepare import prepare, split_documents
from moe.data.shards import Dataset, Split
from moe.data.sources import Document
from moe.errors import BadInput
from tests.moe.data.small_corpora import all_tokens, documents_of, same, texts_of


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """A folder prepared from text files, with several shards per split."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for domain in ("code", "prose"):
        (root / "text" / domain).mkdir(parents=True)
        for i in range(60):
            words = rng.choices(["one", "two", "three", "four", "five", "six", "seven", "αβγ", "\n"], k=60)
            (root / "text" / domain / f"{i}.txt").write_text(" ".join(words) + str(rng.random()))
    data = DataConfig(
        name="text", path=str(root / "text"), cache=str(root), val_fraction=0.2, clean=CleanConfig(min_chars=1, near=0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe.data.shards, "SHARD_TOKENS", 3000)
        dataset = prepare(data, TokenizerConfig("bpe", 300), say=lambda line: None)
    assert len(list(dataset.folder.glob("train-*.bin"))) >= 2
    assert dataset.domains == ["code", "prose"]
    return dataset.folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "corpus"))


def refused(folder: Path, name: str, what: str) -> None:
    with pytest.raises(BadInput, match=what) as error:
        Dataset(folder)
    assert str(folder / name) in str(error.value)
    assert f"delete the folder {folder}" in str(error.value)


def record_again(folder: Path, change: Callable[[dict], None] = lambda manifest: None) -> None:
    """Make the checksums agree with the files as they are now, after `change(manifest)`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")


ALL_FILES = [
    "train-00000.bin",
    "train-00001.bin",
    "val-00000.bin",
    "train-00000.documents.npy",
    "val-00000.documents.npy",
    "tokenizer.json",
    "ranks.tiktoken",
    "manifest.json",
    "manifest.json.sha256",
]


def test_the_copy_itself_opens(folder):
    assert Dataset(folder).split("train").n_tokens > 6000
    record_again(folder)
    Dataset(folder)


def test_a_splits_documents_are_its_tokens_between_the_ends_of_texts(folder):
    dataset = Dataset(folder)
    split, eot = dataset.split("train"), dataset.tokenizer.eot
    documents = list(split.documents())
    assert [token for ids in documents for token in (*ids.tolist(), eot)] == all_tokens(dataset, "train")
    assert not any(eot in ids for ids in documents)
    assert [ids.tolist() for ids in split.documents(every=7)] == [ids.tolist() for ids in documents[::7]]


def test_every_one_of_100_flipped_bits_is_refused_and_its_file_named(folder):
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    for trial in range(100):
        path = files[trial % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refused(folder, path.name.removesuffix(".sha256"), "damaged")
        path.write_bytes(good)
    Dataset(folder)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, name, "cannot be read")


@pytest.mark.parametrize("name", ALL_FILES)
def test_an_empty_file_is_refused(folder, name):
    (folder / name).write_bytes(b"")
    refused(folder, name.removesuffix(".sha256"), "sha256" if name.startswith("manifest") else "empty and should have")


@pytest.mark.parametrize("name", ALL_FILES[:-2])
def test_a_truncated_file_is_refused_with_the_byte_it_ends_at(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3])
    refused(folder, name, f"truncated at byte {len(content) - 3} and should have {len(content)} bytes")
    (folder / name).write_bytes(content + b"\0\0")
    refused(folder, name, f"{len(content) + 2} bytes long")


def test_swapped_shards_are_refused_even_at_the_same_size(folder):
    one, two = folder / "train-00000.bin", folder / "train-00001.bin"
    shortest = min(one.stat().st_size, two.stat().st_size)
    for path in (one, two):
        path.write_bytes(path.read_bytes()[: shortest - 2] + np.uint16(299).tobytes())
        table = np.load(path.with_suffix(".documents.npy"))
        np.save(path.with_suffix(".documents.npy"), table[table[:, 0] < shortest // 2 - 1])
    counted = (one.stat().st_size + two.stat().st_size) // 2
    others = sum(path.stat().st_size // 2 for path in sorted(folder.glob("train-*.bin"))[2:])
    record_again(folder, lambda manifest: manifest["splits"]["train"].update(tokens=counted + others))
    Dataset(folder)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    refused(folder, "train-00000.bin", r"has the content of train-00001\.bin")


def test_an_odd_number_of_bytes_is_refused_even_with_checksums_that_agree(folder):
    path = folder / "val-00000.bin"
    path.write_bytes(path.read_bytes() + b"\0")
    record_again(folder)
    refused(folder, "val-00000.bin", f"its {path.stat().st_size} bytes are not whole uint16 tokens")


def test_a_token_beyond_the_vocabulary_is_refused_with_its_offset(folder):
    path = folder / "train-00001.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[[123, 200]] = 300
    tokens.tofile(path)
    record_again(folder)
    refused(folder, "train-00001.bin", r"token 123 \(byte 246\) is id 300, and the vocabulary has V=300")


def test_tokens_of_another_width_are_refused(folder):
    path = folder / "train-00000.bin"
    np.fromfile(path, np.uint16).astype(np.uint32).tofile(path)
    record_again(folder)
    refused(folder, "train-00000.documents.npy", "does not end with the end-of-text token")
    record_again(folder, lambda manifest: manifest.update(dtype="uint32"))
    refused(folder, "manifest.json", "dtype uint32 is not the uint16 of V=300")


def test_another_tokenizer_is_refused(folder):
    moe.data.shards.Tokenizer.load(folder)
    learned = moe.data.prepare.train(
        TokenizerConfig("bpe", 300), ["an altogether different text, " * 3 + "x" * 99, *map(str, range(999))]
    )
    learned.save(folder)
    record_again(folder)
    refused(folder, "tokenizer.json", "not the tokenizer that the manifest names")


@pytest.mark.parametrize(
    ("alter", "what"),
    [
        (lambda table: table[::-1], "row 0"),
        (lambda table: table + np.array([1, 0]), "row 0"),
        (lambda table: np.concatenate([table[:2], table[1:]]), "row 1"),
        (lambda table: np.concatenate([table, [[10**9, 0]]]), "out of order or range"),
        (lambda table: table - np.array([0, 5]), "row 0 .* out of order or range"),
        (lambda table: table + np.array([0, 2]), "row 0 .* out of order or range"),
        (lambda table: table + (np.arange(len(table)) == 3)[:, None] * [[1, 0]], "document 2 does not end"),
        (lambda table: table.astype(np.int32), r"int32 of shape .* should be int64"),
        (lambda table: table[:, 0], "should be int64 of shape"),
        (lambda table: table[:0], "should be int64 of shape"),
        (lambda table: np.array([["a", None]], dtype=object), "not a table of documents"),
    ],
)
def test_a_document_table_that_does_not_fit_its_shard_is_refused(folder, alter, what):
    path = folder / "train-00000.documents.npy"
    np.save(path, alter(np.load(path)), allow_pickle=True)
    record_again(folder)
    refused(folder, path.name, what)


def test_a_table_that_is_no_array_is_refused(folder):
    (folder / "val-00000.documents.npy").write_bytes(b"no array at all")
    record_again(folder)
    refused(folder, "val-00000.documents.npy", "not a table of documents")


def test_a_manifest_of_another_format_or_of_other_counts_is_refused(folder):
    record_again(folder, lambda manifest: manifest.update(format=0))
    refused(folder, "manifest.json", "its format is 0 and 1 is expected")
    record_again(folder, lambda manifest: manifest.update(format=1))
    record_again(folder, lambda manifest: manifest["splits"]["val"].update(tokens=5))
    refused(folder, "manifest.json", "the val shards hold .* tokens")


def test_a_corpus_altered_with_checksums_that_agree_is_refused_by_the_checkpoints_loader_state(folder):
    state = Loader(Dataset(folder).split("train"), 4, 32, 0).state(3)
    path = folder / "train-00000.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[5] = (tokens[5] + 1) % 256
    tokens.tofile(path)
    record_again(folder)
    loader = Loader(Dataset(folder).split("train"), 4, 32, 0)
    with pytest.raises(BadInput, match=r"the hash of the prepared corpus .* changed since the checkpoint"):
        loader.check_state(state)


def test_shards_decode_back_to_the_documents_with_their_domains(prepare_documents):
    documents = [*documents_of(120), Document("long " * 400, "verse", "longer than a shard")]
    dataset = prepare_documents(documents)
    assert len(list(dataset.folder.glob("train-*.bin"))) > 3
    found = texts_of(dataset, "train") + texts_of(dataset, "val")
    assert Counter(found) == Counter((each.text, each.domain) for each in documents)


@pytest.mark.parametrize("tokenizer", [TokenizerConfig("char"), TokenizerConfig("bpe", 300)])
def test_shards_of_every_tokenizer_decode_back(prepare_documents, tokenizer):
    documents = documents_of(60)
    dataset = prepare_documents(documents, tokenizer)
    assert {text for text, _ in texts_of(dataset, "val")} <= {each.text for each in documents}
    assert Dataset(dataset.folder).tokenizer.fingerprint == dataset.manifest["tokenizer"]


def test_a_vocabulary_over_65536_is_stored_in_four_bytes(prepare_documents, monkeypatch):
    kanji = [Document(chr(0x20000 + i) * 3, "prose", str(i)) for i in range(200)]
    large = moe.data.prepare.train(TokenizerConfig("char"), ["".join(map(chr, range(0x20000, 0x20000 + 65536)))])
    monkeypatch.setattr(moe.data.prepare, "train", lambda cfg, texts, say: large)
    dataset = prepare_documents(kanji)
    assert dataset.manifest["dtype"] == "uint32"
    assert {text for text, _ in texts_of(dataset, "train") + texts_of(dataset, "val")} == {each.text for each in kanji}


def test_the_manifest_counts_what_is_there(prepare_documents):
    documents = documents_of(120)
    dataset = prepare_documents(documents, TokenizerConfig("bpe", 300))
    for name, splits in split_documents(documents, 0.2).items():
        counts = dataset.manifest["splits"][name]
        assert counts["documents"] == len(splits)
        assert counts["bytes"] == sum(len(each.text.encode()) for each in splits)
        assert counts["tokens"] == len(all_tokens(dataset, name)) == dataset.split(name).n_tokens
        for domain, each in counts["domains"].items():
            texts = [one.text for one in splits if one.domain == domain]
            assert each["documents"] == len(texts)
            assert each["tokens"] == sum(len(dataset.tokenizer.encode(text)) + 1 for text in texts)


def test_windows_read_across_shards_as_if_they_were_one_array(dataset):
    tokens = all_tokens(dataset, "train")
    split = dataset.split("train")
    for context in (1, 7, 300, 1500):
        assert split.n_windows(context) == (len(tokens) - 1) // context
        starts = np.arange(split.n_windows(context)) * context
        read, _ = split.read(starts, context)
        assert read.dtype == np.int64
        assert read.tolist() == [tokens[i : i + context + 1] for i in starts.tolist()]


def test_the_domain_of_every_target_is_its_documents(dataset):
    expected = [
        domain
        for text, domain in texts_of(dataset, "train")
        for _ in range(len(text.encode()) + 1)  # bytes, and the end-of-text token
    ]
    split = dataset.split("train")
    _, domain = split.read(np.arange(split.n_windows(13)) * 13, 13)
    assert domain.dtype == np.uint8
    assert [dataset.domains[i] for i in domain.flatten()] == expected[1 : 1 + domain.size]


def test_a_split_survives_being_sent_to_a_worker_that_does_not_fork(dataset):
    context = multiprocessing.reduction.ForkingPickler
    sent = context.loads(context.dumps(dataset.split("train")))
    assert isinstance(sent, Split)
    assert (
        len(context.dumps(dataset.split("train")))
        < 2 * sum(path.stat().st_size for path in dataset.folder.glob("train-*.npy")) + 5000
    )
    assert same(Loader(sent, 4, 32, 0).batch(3), Loader(dataset.split("train"), 4, 32, 0).batch(3))
