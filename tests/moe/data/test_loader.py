"""Claims about moe/data/loader.py: which windows a batch has, and going on from a state."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import psutil
import pytest
import torch

import moe.data.loader
from moe.data.loader import NO_TARGET, Loader, every_window, read_windows, validation_windows
from moe.data.shards import Dataset
from moe.data.sources import Document
from moe.errors import BadInput, of_the_machine
from tests.moe.data.small_corpora import all_tokens, documents_of, same


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


def test_a_split_shorter_than_one_sequence_is_refused_with_its_length(dataset):
    for name in ("train", "val"):
        split = dataset.split(name)
        with pytest.raises(BadInput, match=rf"the {name} split has {split.n_tokens} tokens.*model\.context=100000"):
            Loader(split, 8, 100_000, 0)
        with pytest.raises(BadInput, match=str(split.n_tokens)):
            validation_windows(split, split.n_tokens, 1000)
        assert len(validation_windows(split, split.n_tokens - 1, 1000).start_W) == 1


def test_validation_windows_do_not_overlap_and_span_the_split(dataset):
    split, S = dataset.split("val"), 16
    windows = split.n_windows(S)
    for n_tokens, count in [(1, 1), (S, 1), (5 * S, 5), (5 * S + 3, 5), (10**9, windows), (windows * S, windows)]:
        starts = validation_windows(split, S, n_tokens).start_W
        assert len(starts) == count
        assert (np.diff(starts) >= S).all()
        assert starts[-1] + S + 1 <= split.n_tokens
        assert np.ptp(np.diff(starts)) <= S if count > 1 else True
        assert starts[-1] >= (windows - windows / count - 1) * S


@pytest.fixture
def stranger():
    """A stopped child of this process that is no loader's."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    psutil.Process(process.pid).suspend()
    yield psutil.Process(process.pid)
    process.kill()
    process.join()


def test_a_worker_that_was_stopped_is_named_with_how_long_it_was_waited_for(dataset, monkeypatch, stranger):
    before = set(psutil.Process().children())
    batches = Loader(dataset.split("train"), 8, 64, 3, workers=1).iterate(0)
    next(batches)  # however long the worker takes to start
    monkeypatch.setattr(moe.data.loader, "PATIENCE", 0.4)
    monkeypatch.setattr(moe.data.loader, "LOOK", 0.2)
    (worker,) = set(psutil.Process().children()) - before
    worker.suspend()
    with pytest.raises(BadInput, match=rf"for 0.4 s \(process {worker.pid} is stopped\): .*data\.workers=0"):
        list(islice(batches, 10))  # some were read ahead
    assert not worker.is_running(), "it was left behind"
    assert stranger.status() == psutil.STATUS_STOPPED, "it was let go on"


def test_a_worker_that_was_killed_is_named(dataset):
    before = set(psutil.Process().children())
    batches = Loader(dataset.split("train"), 8, 64, 3, workers=1).iterate(0)
    next(batches)
    (worker,) = set(psutil.Process().children()) - before

    def read_on():
        worker.kill()
        yield from batches

    with pytest.raises(RuntimeError) as caught:
        list(islice(read_on(), 10**4))
    assert f"the loader's worker process {worker.pid} ended (" in str(of_the_machine(caught.value))


HELD = """
import sys
import time
from pathlib import Path

from moe.data.loader import Loader
from moe.data.shards import Dataset

batches = Loader(Dataset(Path(sys.argv[1])).split("train"), 8, 64, 3, workers=1).iterate(0)
next(batches)
sys.held = batches  # as a traceback holds it until the very end
"""


def test_a_process_that_still_holds_its_batches_ends(dataset):
    subprocess.run([sys.executable, "-c", HELD, str(dataset.folder)], check=True, timeout=240)


def test_a_refusal_in_a_worker_is_the_sentence_it_is_in_this_process(dataset, monkeypatch):
    loader = Loader(dataset.split("train"), 8, 64, 3, workers=1)

    def refuse(windows, context):
        raise BadInput("train-00000.bin: cut short: 12 bytes are missing.")

    monkeypatch.setattr(loader.split, "read", refuse)
    with pytest.raises(BadInput) as caught:
        next(loader.iterate(0))
    assert str(caught.value) == "train-00000.bin: cut short: 12 bytes are missing."


def test_workers_that_cannot_be_started_are_refused_with_what_they_need(dataset, monkeypatch):
    def no_semaphore(*arguments, **keywords):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(moe.data.loader.DataLoader, "__iter__", no_semaphore)
    with pytest.raises(BadInput, match=r"^data\.workers=2 cannot be started \(Function not implemented\): .*/dev/shm"):
        next(Loader(dataset.split("train"), 8, 64, 3, workers=2).iterate(0))


def conversation(i: int) -> Document:
    """A document of which the last word is learnt."""
    text = f"question {i} " + "x" * (i * 7 % 23)
    return Document(f"{text} answer{i}", "chat", str(i), ((len(text) + 1, len(text) + 8),))


@pytest.mark.parametrize("context", [48, 60, 200])
def test_whole_documents_are_each_learnt_once_and_never_cut(prepare_documents, context):
    split = prepare_documents([conversation(i) for i in range(60)]).split("train")
    windows = every_window(split, context, whole=True)
    tokens, targets, _ = read_windows(split, windows, context)
    stop_D = np.cumsum(split.lengths())
    places = windows.start_W[:, None] + np.arange(1, context + 1)
    learnt = split.learnt([0], split.n_tokens - 1)[0]
    # By the definition: every learnt token is a target exactly once, and with it its whole document is in the window.
    counted = np.bincount(places[targets != NO_TARGET], minlength=split.n_tokens)
    np.testing.assert_array_equal(counted[1:], learnt)
    for start, place in zip(
        windows.start_W, [row[use] for row, use in zip(places, targets != NO_TARGET, strict=True)], strict=True
    ):
        document = np.searchsorted(stop_D, place, side="right")
        first = stop_D[document] - split.lengths()[document]
        assert (first >= start).all()
        assert (stop_D[document] <= start + context + 1).all()
    assert (tokens[:, 1:] == np.where(targets == NO_TARGET, tokens[:, 1:], targets)).all()


def test_a_document_longer_than_a_window_is_refused_with_how_long_a_context_it_needs(prepare_documents):
    split = prepare_documents([conversation(i) for i in range(60)]).split("train")
    longest = split.lengths().max()
    Loader(split, 2, longest - 1, 0, whole=True)
    with pytest.raises(BadInput, match=rf"of the {len(split.lengths())} documents .*raise it to {longest - 1}"):
        Loader(split, 2, longest - 2, 0, whole=True)


def test_text_has_no_target_that_is_not_learnt(dataset):
    split = dataset.split("train")
    assert split.learnt([0], 8) is None
    tokens, targets, _ = read_windows(split, every_window(split, 64), 64)
    np.testing.assert_array_equal(targets, tokens[:, 1:])
