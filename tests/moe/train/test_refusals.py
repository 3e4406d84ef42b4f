"""Claims about a machine that says no while a run trains: a sentence, and the last good checkpoint in it."""

import builtins
import errno
import os
from pathlib import Path

import pytest
import torch

import moe.train.loop
import moe.train.step
from moe.errors import BadInput
from moe.run import checkpoint
from moe.run.checkpoint import last_good
from moe.train.refusals import naming_checkpoint
from tests.small_runs import SAVED, fate, settings, train, train_until

MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(), RuntimeError("[x] "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_says_what_to_lower_and_names_the_last_good_checkpoint(
    error, corpus, tmp_path, monkeypatch
):
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        if state.step == SAVED + 1:
            raise error
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    with pytest.raises(BadInput) as caught:
        train(settings(corpus, tmp_path / "run"))
    message = str(caught.value)
    assert message.startswith("there is not enough memory")
    for setting in ("train.batch_size=4", "model.context=32", "train.accumulate=1"):
        assert setting in message
    good = tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}"
    assert message.endswith(f"; the last good checkpoint is {good}.")
    assert checkpoint.load(good).step == SAVED


def test_a_mistake_in_the_code_keeps_its_traceback(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="shape mismatch"), naming_checkpoint(settings(corpus, "run"), tmp_path):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("said", ["the checkpoints' disk is full.", "it is full; no checkpoint was written yet."])
def test_the_last_good_checkpoint_is_named_once_whatever_else_is_said_of_checkpoints(said, corpus, tmp_path):
    with pytest.raises(BadInput) as caught, naming_checkpoint(settings(corpus, "run"), tmp_path):
        raise BadInput(said)
    assert str(caught.value) == f"{said.partition('; ')[0].rstrip('.')}; no checkpoint was written yet."


def test_without_a_good_checkpoint_the_sentence_says_so(tmp_path):
    assert last_good(tmp_path / "none") == "no checkpoint was written yet"
    (tmp_path / "step-00000001").mkdir()
    assert last_good(tmp_path) == "no checkpoint is good"


REFUSED = {  # what of the system -> which of its arguments is a path
    "open": (builtins, "open", 0),
    "mkdir": (os, "mkdir", 0),
    "rename": (os, "rename", 1),
    "replace": (os, "replace", 1),
    "listdir": (os, "listdir", 0),
}


@pytest.fixture
def read_only(monkeypatch):
    """(folder, a name of `REFUSED`) -> from now on the system refuses that below `folder`."""

    def arrange(folder: Path, name: str) -> None:
        module, function, position = REFUSED[name]
        honest = getattr(module, function)

        def refuse(*arguments, **keywords):
            path = arguments[position]
            writes = name != "open" or (len(arguments) > 1 and arguments[1][0] in "wa")
            if isinstance(path, str | Path) and str(path).startswith(str(folder)) and writes:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return honest(*arguments, **keywords)

        monkeypatch.setattr(module, function, refuse)

    return arrange


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence_and_nothing_is_lost(
    name, resumed, read_only, corpus, tmp_path, monkeypatch
):
    cfg = settings(corpus, tmp_path / "run", {"resume": True, "log.experts": True})
    if resumed:
        train_until(cfg, SAVED + 2)
    before = fate(tmp_path / "run")["step"] if resumed else None
    read_only(tmp_path, name)
    with pytest.raises(BadInput, match="Read-only file system"):
        train(cfg)
    monkeypatch.undo()
    if resumed:
        assert fate(tmp_path / "run")["step"] == before
    train(cfg)
    assert (tmp_path / "run" / "summary.json").exists()
