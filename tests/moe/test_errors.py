"""Claims about what of the machine's refusals becomes a sentence, with what to mend."""

import errno
import os

import numpy as np
import pytest
import torch

from moe.errors import BadInput, of_the_machine


def os_error(number, name="runs/a"):
    return OSError(number, os.strerror(number), name)


WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{0}: {1}"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (os_error(errno.ENOSPC), ["runs/a: No space left on device: free some space"]),
        (os_error(errno.EROFS), ["runs/a: Read-only file system: it can only be read there"]),
        (os_error(errno.EACCES), ["runs/a: Permission denied: have yourself permitted"]),
        (os_error(errno.EMFILE), ["Too many open files: raise the limit on open files (ulimit -n)"]),
        (
            os_error(errno.ENAMETOOLONG, "n" * 300),
            ["nnn… (300 characters): File name too long: a name may have up to 255"],
        ),
        (os_error(errno.ENOENT, b"runs/b"), ["runs/b: No such file or directory."]),
        (OSError("no words of the system"), ["no words of the system."]),
        (os_error(errno.ENOMEM), ["there is not enough memory: make the batch"]),
        (MemoryError(), ["there is not enough memory: make the batch"]),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), ["not enough memory (7.28 TiB were asked for)"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ["(2.00 GiB were asked for)"]),
        (
            RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
            ["worker process 71 ended (killed by signal: Killed)", "data.workers"],
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"),
            ["worker process 71, 72 ended (exited unexpectedly)", "data.workers"],
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
            ["no shared memory", "/dev/shm", "data.workers=0"],
        ),
        (RuntimeError(WORKER.format("RuntimeError", "can't allocate memory")), ["there is not enough memory"]),
        (OSError(WORKER.format("OSError", "[Errno 5] Input/output error")), ["[Errno 5] Input/output error."]),
    ],
)
def test_what_the_machine_refuses_is_one_sentence_that_says_what_to_mend(error, words):
    refusal = of_the_machine(error)
    assert isinstance(refusal, BadInput)
    assert all(word in str(refusal) for word in words), str(refusal)
    assert "\n" not in str(refusal)


def test_the_allocators_of_torch_and_numpy_are_understood():
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**15)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert "were asked for): lower train.batch_size" in str(of_the_machine(caught.value, "lower train.batch_size"))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x"), ValueError(), ZeroDivisionError()])
def test_a_mistake_in_the_code_is_left_its_traceback(error):
    assert of_the_machine(error) is None
