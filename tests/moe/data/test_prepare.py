"""Claims about moe/data/prepare.py and about what moe/data/shards.py writes."""

import hashlib
import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import moe.data.prepare
import moe.data.shards
from moe.config.data import CleanConfig, DataConfig, TokenizerConfig
from moe.data.loader import Loader, validation_starts
from moe.data.prepare import cache_root, prepare, split_documents
from moe.data.shards import Dataset, Split
from moe.data.sources import Document
from moe.errors import BadInput

AS_IT_IS = CleanConfig(html=False, unicode="none", min_chars=0, max_repetition=1.0, exact=False, near=0.0)
BYTE = TokenizerConfig("byte")


def silent(line: str) -> None:
    pass


def documents_of(n: int, seed: int = 0) -> list[Document]:
    """Documents of random words, some not ASCII, of very uneven lengths, in three domains."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "γάμμα", "delta", "😀", "x = 1", "\n", "漢字", "of", "the"]
    texts = [" ".join(rng.choices(words, k=rng.choice([3, 10, 60]))) + str(i) for i in range(n)]
    return [Document(text, rng.choice(["code", "prose", "verse"]), f"{seed}-{i}") for i, text in enumerate(texts)]


@pytest.fixture
def prepare_documents(tmp_path, monkeypatch):
    """`prepare` on documents given as a list, with small shards."""
    monkeypatch.setattr(moe.data.shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(moe.data.shards, "ENCODE_CHARACTERS", 900)

    def build(documents: list[Document], tokenizer=BYTE, say=silent, **settings) -> Dataset:
        settings = {"cache": str(tmp_path), "clean": AS_IT_IS, "val_fraction": 0.2} | settings
        content = hashlib.sha256(repr(documents).encode()).hexdigest()
        monkeypatch.setattr(moe.data.prepare.sources, "documents", lambda cfg, cache: iter(documents))
        monkeypatch.setattr(moe.data.prepare.sources, "source_fingerprint", lambda cfg, cache, *readers: content)
        return prepare(DataConfig(**settings), tokenizer, say)

    return build


def texts_of(dataset: Dataset, name: str) -> list[tuple[str, str]]:
    """(text, domain) of each document, decoded from the files alone."""
    found = []
    for path in sorted(dataset.folder.glob(f"{name}-*.bin")):
        tokens = np.fromfile(path, dataset.manifest["dtype"]).tolist()
        table = np.load(path.with_suffix(".documents.npy"), allow_pickle=False).tolist()
        stops = [start for start, _ in table[1:]] + [len(tokens)]
        for (start, domain), stop in zip(table, stops, strict=True):
            assert tokens[stop - 1] == dataset.tokenizer.eot
            found.append((dataset.tokenizer.decode(tokens[start : stop - 1]), dataset.domains[domain]))
    return found


def all_tokens(dataset: Dataset, name: str) -> list[int]:
    return [
        token
        for path in sorted(dataset.folder.glob(f"{name}-*.bin"))
        for token in np.fromfile(path, dataset.manifest["dtype"]).tolist()
    ]


# ------------------------------------------------------------------------------------------ the split and the shards


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
    monkeypatch.setattr(moe.data.prepare, "train", lambda cfg, texts: large)
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


def test_a_second_call_opens_the_folder_without_doing_anything_again(prepare_documents, monkeypatch):
    documents = documents_of(60)
    first = prepare_documents(documents)

    def must_not_run(*arguments):
        raise AssertionError("redone")

    for module, name in ((moe.data.prepare.clean, "clean"), (moe.data.prepare, "train"), (moe.data.prepare, "publish")):
        monkeypatch.setattr(module, name, must_not_run)
    assert prepare_documents(documents).sha256 == first.sha256


def test_a_changed_source_or_setting_makes_a_new_folder_and_the_worker_count_does_not(
    prepare_documents,
):
    documents = documents_of(60)
    same = {prepare_documents(documents, **each).folder for each in ({}, {"workers": 2})}
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


@pytest.mark.parametrize(
    ("documents", "split"), [([], "train"), ([Document("alone " * 9, "prose", "one")], "(train|val)")]
)
def test_a_split_without_a_document_is_refused(prepare_documents, documents, split):
    with pytest.raises(BadInput, match=rf"the {split} split got none of the {len(documents)} documents"):
        prepare_documents(documents)


def test_too_many_domains_and_half_a_character_are_refused(prepare_documents):
    many = [Document(f"text number {i}", f"domain {i}", str(i)) for i in range(300)]
    with pytest.raises(BadInput, match="300 domains"):
        prepare_documents(many)
    with pytest.raises(BadInput, match=r"bad\.jsonl:3 .* at character 4"):
        prepare_documents([*documents_of(20), Document("half\ud83d", "prose", "bad.jsonl:3")])


def test_the_cache_is_the_setting_else_the_variable_else_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWITCHYARD_CACHE", raising=False)
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "switchyard"
    monkeypatch.setenv("SWITCHYARD_CACHE", "/elsewhere")
    assert cache_root(DataConfig()) == Path("/elsewhere")
    assert cache_root(DataConfig(cache="/here")) == Path("/here")


# ------------------------------------------------------------------------------------------ windows and batches


@pytest.fixture
def dataset(prepare_documents) -> Dataset:
    return prepare_documents(documents_of(120))


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


def oracle_batch(dataset: Dataset, step: int, B: int, S: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and targets from the definition, out of one plain list of tokens."""
    tokens = all_tokens(dataset, "train")
    windows = (len(tokens) - 1) // S
    inputs, targets = [], []
    for n in range(step * B, step * B + B):
        epoch, position = n // windows, n % windows
        key = np.random.SeedSequence(seed, spawn_key=(epoch,))
        i = int(np.random.Generator(np.random.Philox(key)).permutation(windows)[position])
        inputs.append(tokens[i * S : i * S + S])
        targets.append(tokens[i * S + 1 : i * S + S + 1])
    return inputs, targets


def test_batches_equal_the_definition_across_epochs(dataset):
    B, S, seed = 8, 64, 3
    loader = Loader(dataset.split("train"), B, S, seed)
    assert loader.n_windows < 40 * B
    for step in (0, 1, 17, 39, 40, 10**6, 5):
        batch = loader.batch(step)
        inputs, targets = oracle_batch(dataset, step, B, S, seed)
        assert (batch.tokens_BS.tolist(), batch.targets_BS.tolist()) == (inputs, targets)
        assert (batch.tokens_BS.dtype, batch.targets_BS.dtype) == (torch.int64, torch.int64)
        assert batch.domain_BS.shape == (B, S)
        assert batch.domain_BS.dtype == torch.uint8


def test_a_batch_larger_than_the_epoch_is_served(dataset):
    loader = Loader(dataset.split("train"), 25, 1500, 0)
    assert loader.n_windows < 12
    assert loader.batch(1).tokens_BS.tolist() == oracle_batch(dataset, 1, 25, 1500, 0)[0]


def same(left, right) -> bool:
    return all(torch.equal(getattr(left, key), getattr(right, key)) for key in ("tokens_BS", "targets_BS", "domain_BS"))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_gives_the_same_batches_for_any_number_of_workers_and_ends_them(dataset, workers):
    loader = Loader(dataset.split("train"), 8, 64, 3, workers)
    children = len(psutil.Process().children())
    batches = loader.iterate(30)
    for step in range(30, 50):
        assert same(next(batches), loader.batch(step))
    assert len(psutil.Process().children()) == children + workers
    batches.close()
    assert len(psutil.Process().children()) == children


def test_iterating_leaves_the_global_random_state_alone(dataset):
    before = torch.get_rng_state()
    next(Loader(dataset.split("train"), 8, 64, 3).iterate(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_survives_being_sent_to_a_worker_that_does_not_fork(dataset):
    context = multiprocessing.reduction.ForkingPickler
    sent = context.loads(context.dumps(dataset.split("train")))
    assert isinstance(sent, Split)
    assert (
        len(context.dumps(dataset.split("train")))
        < 2 * sum(path.stat().st_size for path in dataset.folder.glob("train-*.npy")) + 5000
    )
    assert same(Loader(sent, 4, 32, 0).batch(3), Loader(dataset.split("train"), 4, 32, 0).batch(3))


def test_each_epoch_visits_each_window_once_in_an_order_of_its_own(dataset):
    S = 16
    split = dataset.split("train")
    loader = Loader(split, 1, S, 0)
    window = {tuple(row): i for i, row in enumerate(split.read(np.arange(loader.n_windows) * S, S)[0][:, :S].tolist())}
    # The text repeats words, so a few windows are equal: count them as they come.
    expected = Counter(map(tuple, split.read(np.arange(loader.n_windows) * S, S)[0][:, :S].tolist()))
    orders = []
    for epoch in range(3):
        rows = [
            tuple(batch.tokens_BS[0].tolist())
            for batch in islice(loader.iterate(epoch * loader.n_windows), loader.n_windows)
        ]
        assert Counter(rows) == expected
        orders.append([window[row] for row in rows])
    assert orders[0] != orders[1] != orders[2] != sorted(orders[2])


def test_no_more_than_two_epochs_orders_are_kept(dataset):
    loader = Loader(dataset.split("train"), 8, 64, 0)
    for step in (0, 100, 200, 300, 50):
        loader.batch(step)
    assert len(loader._orders) == 2


def test_different_seeds_give_different_orders(dataset):
    one, other = (Loader(dataset.split("train"), 8, 64, seed).batch(0) for seed in (0, 1))
    assert not same(one, other)


# ------------------------------------------------------------------------------------------ resuming


def test_resuming_from_a_step_gives_the_batches_that_would_have_followed(dataset):
    uninterrupted = list(islice(Loader(dataset.split("train"), 8, 64, 3).iterate(0), 45))
    state = json.loads(json.dumps(Loader(dataset.split("train"), 8, 64, 3).state(20)))
    resumed = Loader(Dataset(dataset.folder).split("train"), 8, 64, 3, workers=2)
    resumed.check_state(state)
    batches = resumed.iterate(state["step"])
    assert all(same(next(batches), batch) for batch in uninterrupted[20:])
    batches.close()


def test_the_state_says_epoch_and_position(dataset):
    loader = Loader(dataset.split("train"), 8, 64, 3)
    state = loader.state(50)
    assert state["epoch"] * loader.n_windows + state["position"] == 400
    assert state["epoch"] >= 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, r"train\.batch_size changed .* 8 and is now 4"),
        ({"context": 32}, r"model\.context changed .* 64 and is now 32"),
        ({"seed": 4}, r"seed changed .* 3 and is now 4"),
    ],
)
def test_a_setting_that_changed_since_the_checkpoint_is_named(dataset, change, named):
    settings = {"batch_size": 8, "context": 64, "seed": 3}
    state = Loader(dataset.split("train"), **settings).state(20)
    with pytest.raises(BadInput, match=named):
        Loader(dataset.split("train"), **(settings | change)).check_state(state)


@pytest.mark.parametrize("key", ["dataset", "order", "epoch", "position"])
def test_every_other_part_of_the_state_is_checked(dataset, key):
    loader = Loader(dataset.split("train"), 8, 64, 3)
    for altered in ("something else", None):
        with pytest.raises(BadInput, match=f"{key}|corpus"):
            loader.check_state(loader.state(20) | {key: altered})
    for step in (None, -1, "3"):
        with pytest.raises(BadInput, match="step="):
            loader.check_state(loader.state(20) | {"step": step})


def test_a_corpus_that_changed_since_the_checkpoint_is_refused(prepare_documents):
    state = Loader(prepare_documents(documents_of(60)).split("train"), 8, 64, 3).state(20)
    with pytest.raises(BadInput, match=r"the hash of the prepared corpus .* changed since the checkpoint"):
        Loader(prepare_documents(documents_of(61)).split("train"), 8, 64, 3).check_state(state)


# ------------------------------------------------------------------------------------------ short splits, validation


def test_a_split_shorter_than_one_sequence_is_refused_with_its_length(dataset):
    for name in ("train", "val"):
        split = dataset.split(name)
        with pytest.raises(BadInput, match=rf"the {name} split has {split.n_tokens} tokens.*model\.context=100000"):
            Loader(split, 8, 100_000, 0)
        with pytest.raises(BadInput, match=str(split.n_tokens)):
            validation_starts(split, split.n_tokens, 1000)
        assert len(validation_starts(split, split.n_tokens - 1, 1000)) == 1


def test_validation_windows_do_not_overlap_and_span_the_split(dataset):
    split, S = dataset.split("val"), 16
    windows = split.n_windows(S)
    for n_tokens, count in [(1, 1), (S, 1), (5 * S, 5), (5 * S + 3, 5), (10**9, windows), (windows * S, windows)]:
        starts = validation_starts(split, S, n_tokens)
        assert len(starts) == count
        assert (np.diff(starts) >= S).all()
        assert starts[-1] + S + 1 <= split.n_tokens
        assert np.ptp(np.diff(starts)) <= S if count > 1 else True
        assert starts[-1] >= (windows - windows / count - 1) * S


def test_a_corpus_prepared_before_stages_had_versions_is_opened_as_it_is(tmp_path, monkeypatch):
    """The name is the one that hashes of the source files gave to this corpus, whose folder then is any other's."""
    monkeypatch.chdir(tmp_path)  # the path as it is given is part of the key
    for i in range(40):
        path = tmp_path / "text" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(random.Random(i).choices([f"word{n}" for n in range(500)], k=60)))
        os.utime(path, ns=(10**18, 10**18))
    cfg = DataConfig(name="text", path="text", cache=str(tmp_path / "cache"), val_fraction=0.2)
    now = prepare(cfg, BYTE, silent).folder
    before = now.with_name("text-byte-a666f9a448351dcd")
    now.rename(before)
    assert prepare(cfg, BYTE, silent).folder == before
