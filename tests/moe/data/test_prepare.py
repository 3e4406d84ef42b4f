"""Claims about moe/data/prepare.py: which split a document is in, and one good folder whatever happens."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moe.data.prepare
import moe.data.shards
from moe.config.data import DataConfig, TokenizerConfig
from moe.data.prepare import cache_root, prepare, split_documents
from moe.data.shards import Dataset
from moe.data.sources import Document
from moe.errors import BadInput
from tests.moe.data.small_corpora import AS_IT_IS, BYTE, documents_of, silent


def test_no_document_is_in_both_splits_and_none_is_lost():
    documents = documents_of(300)
    splits = split_documents(documents, 0.1)
    train, val = ({each.text for each in splits[name]} for name in ("train", "val"))
    assert not train & val
    assert train | val == {each.text for each in documents}
    assert 10 < len(val) < 60


def test_the_side_of_a_document_is_the_hash_of_its_text():
    for document in (splits := split_documents(documents_of(100), 0.3))["val"] + splits["train"]:
        share = int(hashlib.sha256(document.text.encode()).hexdigest()[:16], 16) / 2**64
        assert (document in splits["val"]) == (share < 0.3)


def test_adding_documents_moves_none():
    few, more = documents_of(100), documents_of(100) + documents_of(150, seed=1)
    random.Random(1).shuffle(more)
    before, after = split_documents(few, 0.1), split_documents(more, 0.1)
    for name in ("train", "val"):
        assert {each.text for each in before[name]} <= {each.text for each in after[name]}


def test_copies_of_a_text_land_on_the_same_side():
    documents = documents_of(40)
    copies = [replace(each, domain="copy", name="copy of " + each.name) for each in documents]
    splits = split_documents(documents + copies, 0.3)
    assert not {each.text for each in splits["train"]} & {each.text for each in splits["val"]}


def test_the_tokenizer_learns_from_the_train_split_alone(prepare_documents):
    documents = documents_of(60)
    hidden = split_documents(documents, 0.2)["val"][0]
    only_there = chr(0x1F999)
    secret = next(
        text
        for i in range(1000)
        if int(hashlib.sha256((text := f"{hidden.text} {only_there}{i}").encode()).hexdigest()[:16], 16) < 0.2 * 2**64
    )
    dataset = prepare_documents([*documents, Document(secret, "prose", "secret")], TokenizerConfig("char"))
    assert len(dataset.tokenizer.encode("😀")) == 1
    assert len(dataset.tokenizer.encode(only_there)) == 4


def test_text_is_read_in_the_tokens_of_another_run_wherever_that_lies(prepare_documents, tmp_path):
    learned = prepare_documents(documents_of(60), TokenizerConfig("bpe", 300)).tokenizer
    for name in ("here", "there"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        learned.save(tmp_path / name / "tokenizer")
    said: list[str] = []
    others = [Document(f"{document.text} more", "prose", document.name) for document in documents_of(40)]
    here, there = (
        prepare_documents(others, TokenizerConfig("saved", path=str(tmp_path / name)), said.append)
        for name in ("here", "there")
    )
    assert here.tokenizer.fingerprint == learned.fingerprint
    assert here.folder == there.folder
    assert f"tokenizer: bpe, {learned.vocab_size:,} tokens, of a run" in said
    with pytest.raises(BadInput, match=r"nowhere/tokenizer/tokenizer.json cannot be read"):
        prepare_documents(others, TokenizerConfig("saved", path=str(tmp_path / "nowhere")))


def test_a_second_call_opens_the_folder_without_doing_anything_again(prepare_documents, monkeypatch):
    documents = documents_of(60)
    first = prepare_documents(documents)

    def must_not_run(*arguments):
        raise AssertionError("redone")

    for module, name in ((moe.data.prepare.clean, "clean"), (moe.data.prepare, "train"), (moe.data.prepare, "publish")):
        monkeypatch.setattr(module, name, must_not_run)
    assert prepare_documents(documents).sha256 == first.sha256


def test_a_changed_source_or_setting_makes_a_new_folder_and_how_the_text_is_read_does_not(
    prepare_documents,
):
    documents = documents_of(60)
    same = {prepare_documents(documents, **each).folder for each in ({}, {"workers": 2}, {"documents": "separate"})}
    assert len(same) == 1
    others = [
        prepare_documents(documents[1:]),
        prepare_documents(documents, TokenizerConfig("char")),
        prepare_documents(documents, val_fraction=0.3),
        prepare_documents(documents, clean=replace(AS_IT_IS, exact=True)),
    ]
    assert len({each.folder for each in others} | same) == 5


def test_the_order_in_which_documents_arrive_changes_no_byte(prepare_documents):
    documents = documents_of(60)
    documents += [replace(each, domain="copy") for each in documents]
    forward, backward = (
        prepare_documents(order, TokenizerConfig("bpe", 300)) for order in (documents, documents[::-1])
    )
    assert forward.folder != backward.folder
    assert forward.manifest["files"] == backward.manifest["files"]


def test_nothing_is_left_behind_when_preparing_fails(prepare_documents, tmp_path, monkeypatch):
    def full_disk(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moe.data.shards.Tokenizer, "save", full_disk)
    with pytest.raises(BadInput, match=rf"{tmp_path} \(No space left on device, .* MB free\).*data\.cache"):
        prepare_documents(documents_of(60))
    assert list((tmp_path / "prepared").iterdir()) == []


def _prepare_at_once(barrier, results, prepare_it: Callable[[], Dataset]) -> None:
    learn = moe.data.prepare.train

    def wait_then_train(*arguments):
        barrier.wait(timeout=60)  # both have seen that there is no folder, and neither has written
        return learn(*arguments)

    moe.data.prepare.train = wait_then_train
    dataset = prepare_it()
    results.put((str(dataset.folder), dataset.sha256))


def test_two_processes_preparing_at_once_give_one_good_folder(prepare_documents, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    documents = documents_of(60)
    arguments = (barrier, results, lambda: prepare_documents(documents))
    processes = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len(answers) == 1
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == [Path(answers.pop()[0]).name]
    assert prepare_documents(documents).split("train").n_tokens > 0


def test_prepare_says_which_domain_has_no_validation_text(prepare_documents):
    documents = documents_of(60)
    rare = split_documents(documents, 0.2)["train"][0]
    documents = [replace(each, domain="rare") if each == rare else each for each in documents]
    said: list[str] = []
    prepare_documents(documents, say=said.append)
    assert any("val: no document of domain rare" in line for line in said)
    assert not any("domain prose" in line for line in said)
    assert any("byte, 257 tokens" in line for line in said)


@pytest.mark.parametrize("documents", [[], [Document("alone " * 9, "prose", "one")]])
def test_a_corpus_of_fewer_than_two_documents_is_refused_with_what_to_do(prepare_documents, documents):
    expected = rf"the (train|val) split got none of the {len(documents)} documents.*a second document.*divide the text"
    with pytest.raises(BadInput, match=expected):
        prepare_documents(documents)


def test_a_split_without_a_document_is_refused_with_a_fraction_that_fits(prepare_documents):
    for seed in range(20):
        documents = documents_of(3, seed)
        for fraction in (0.0001, 0.2, 0.5):
            try:
                split_documents(documents, fraction)
            except BadInput as error:
                advised = re.search(r"set data\.val_fraction=([\d.]+)", str(error))
                if advised:
                    assert all(split_documents(documents, float(advised[1])).values())
                else:  # as fine a scan finds none either
                    assert not any(_both(documents, i / 1000) for i in range(1, 501))


def _both(documents: list[Document], fraction: float) -> bool:
    try:
        return all(split_documents(documents, fraction).values())
    except BadInput:
        return False


def test_half_a_character_is_refused(prepare_documents):
    with pytest.raises(BadInput, match=r"bad\.jsonl:3 .* at character 4"):
        prepare_documents([*documents_of(20), Document("half\ud83d", "prose", "bad.jsonl:3")])


def test_more_than_256_domains_are_told_apart(prepare_documents):
    said: list[str] = []
    many = [Document(f"text number {i:04d}", f"domain {i:04d}", str(i)) for i in range(300)]
    dataset = prepare_documents(many, say=said.append)
    split = dataset.split("train")
    (tokens,), (domain,) = split.read(np.array([0]), split.n_tokens - 1)
    ends = np.flatnonzero(tokens == dataset.tokenizer.eot)
    assert len(ends) > 200
    for end in ends:  # a target's domain is at the place before the target
        number = dataset.tokenizer.decode(tokens[end - 4 : end])
        assert dataset.domains[domain[end - 2]] == dataset.domains[domain[end - 1]] == f"domain {number}"
    assert max(map(len, said)) < 500


def test_the_cache_is_the_setting_else_the_variable_else_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWITCHYARD_CACHE", raising=False)
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "switchyard"
    monkeypatch.setenv("SWITCHYARD_CACHE", "/elsewhere")
    assert cache_root(DataConfig()) == Path("/elsewhere")
    assert cache_root(DataConfig(cache="/here")) == Path("/here")


# ------------------------------------------------------------------------------------------ short splits, validation


@pytest.mark.parametrize("since", ["a666f9a448351dcd", ""])
def test_a_corpus_that_was_cleaned_alike_under_an_older_name_is_opened_as_it_is(since, tmp_path, monkeypatch):
    """The names are those that hashes of the source files gave to this corpus, and version 1 of the cleaning."""
    cfg, before, now = forty_texts(tmp_path, monkeypatch, since)
    assert prepare(cfg, BYTE, silent).folder == before != now


@pytest.mark.parametrize("since", ["a666f9a448351dcd", ""])
def test_a_corpus_whose_pages_were_converted_otherwise_is_prepared_again(since, tmp_path, monkeypatch):
    cfg, before, now = forty_texts(tmp_path, monkeypatch, since)
    manifest = json.loads((before / "manifest.json").read_text())
    assert manifest["cleaning"][0]["name"] == "html"
    manifest["cleaning"][0]["bytes_in"] += 7  # its tags
    (before / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(cfg, BYTE, silent).folder == now


def forty_texts(tmp_path, monkeypatch, since: str) -> tuple[DataConfig, Path, Path]:
    """Settings of forty files whose paths and times are always the same, the folder of their corpus under the name that
    ends in `since` ("": that of version 1), and the one it would have now."""
    monkeypatch.chdir(tmp_path)  # the path as it is given is part of the key
    for i in range(40):
        path = tmp_path / "text" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(random.Random(i).choices([f"word{n}" for n in range(500)], k=60)))
        os.utime(path, ns=(10**18, 10**18))
    cfg = DataConfig(name="text", path="text", cache=str(tmp_path / "cache"), val_fraction=0.2)
    now = prepare(cfg, BYTE, silent).folder
    if since:
        before = now.rename(now.with_name(f"text-byte-{since}"))
    else:
        shutil.rmtree(now)
        with monkeypatch.context() as older:
            older.setattr("moe.data.clean.VERSION", 1)
            before = prepare(cfg, BYTE, silent).folder
    return cfg, before, now
