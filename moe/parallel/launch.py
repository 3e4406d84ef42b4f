"""How ranks meet, agree, and part: torchrun's contract (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) alone.

Whoever starts processes with these variables set has ranks: torchrun, srun, a test. What is wrong with one of them is
told once: the first to say it in the store that they share says it to the person, and the others end in silence. Ranks
that a death or a hang leaves behind find out whose it was.
"""

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from moe.errors import BadInput
from moe.parallel.collectives import n_ranks, rank

CONTRACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MEET = timedelta(seconds=60)  # for the store and the first greeting
BEAT = 1.0  # seconds between two signs of life of a rank
ANSWER = 4.0  # seconds for one, once a rank is missed
LOST = re.compile(
    r"timed? ?out|connection (closed|reset|refused)|broken pipe|socket|peer|gloo|nccl|wait.*timeout", re.IGNORECASE
)
T = TypeVar("T")


class _Ranks:
    """What this process knows of the others once it has met them."""

    store: Store | None = None
    control: dist.ProcessGroup | None = None  # of gloo, for flags: no device waits for it
    seconds = 0.0  # that one is waited for
    places: list[str]  # who the ranks are, for people


_ranks = _Ranks()


def started_by_many() -> bool:
    """Whether this process was started as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def join(device: str, seconds: float) -> None:
    """Meet the other ranks, where there are any; `device`: cpu, cuda or auto, `seconds`: how long one is waited for.
    Raises `BadInput` for a contract that is not whole, a port that is taken, and GPUs that are not there."""
    if not started_by_many() or dist.is_initialized():
        return
    # Who this process is, and what ranks talk by: gloo, and on GPUs NCCL beside it.
    number, n, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    backend = "cpu:gloo"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        if not dist.is_nccl_available() or torch.cuda.device_count() <= local:
            raise BadInput(
                f"train.device={device} with {n} ranks needs NCCL and a GPU for each, and rank {number} has "
                f"{torch.cuda.device_count()}: use train.device=cpu, which takes gloo, or start fewer ranks."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"

    # Meet.
    try:
        _ranks.store = _store(number, n)
        _ranks.seconds, limit = seconds, timedelta(seconds=seconds)
        dist.init_process_group(
            backend, store=PrefixStore("ranks", _ranks.store), rank=number, world_size=n, timeout=limit
        )
        _ranks.control = new_group()
        beating = (_store(number, n, joins=True), number)
        threading.Thread(target=_beat, args=beating, daemon=True, name="beat").start()
    except (RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        words = str(error).splitlines()[0].rstrip(".")
        raise BadInput(
            f"rank {number} of {n} cannot meet the others at {where} ({words}): is the port free there?"
        ) from None
    me = f"rank {number} (process {os.getpid()} on {socket.gethostname()})"
    _ranks.places = shared(me)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        given = os.environ.get(name)
        raise BadInput(
            f"{name}={given if given is not None else ''} is not the number that ranks are started with: torchrun sets "
            f"all of {', '.join(CONTRACT)}."
        ) from None


def _store(number: int, n: int, joins: bool = False) -> Store:
    """What ranks leave one another words in: torchrun's own where there is one, else one that rank 0 keeps, but for one
    that `joins` it. Every attempt of torchrun has its own words there."""
    address, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not address:
        raise BadInput(f"MASTER_ADDR is not set, and ranks cannot meet: torchrun sets all of {', '.join(CONTRACT)}.")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, n, is_master=number == 0 and not (agent or joins), timeout=MEET)
    return PrefixStore(f"switchyard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def new_group() -> dist.ProcessGroup | None:
    """A group of gloo over all ranks, for talk beside that of others; None where there is one process."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=_ranks.seconds)) if n_ranks() > 1 else None


def _beat(store: Store, number: int) -> None:
    """Signs of life of this process, whatever its main thread waits for."""
    with suppress(RuntimeError):
        while True:
            store.add(f"beats/{number}", 1)
            time.sleep(BEAT)


# Agreement, apart from the work on the device


def shared(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank gives, in their order, on all of them; plain values. `group`: instead of that for flags."""
    if n_ranks() == 1:
        return [value]
    values: list[Any] = [None] * n_ranks()
    dist.all_gather_object(values, value, group=group or _ranks.control)
    return values


def from_first(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on all of them."""
    return shared(value, group)[0]


def any_rank(flag: bool) -> bool:
    """Whether it holds on one of the ranks."""
    return largest(int(flag)) > 0


def largest(number: int) -> int:
    """The largest of the ranks' numbers."""
    if n_ranks() == 1:
        return number
    flag = torch.tensor(number)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=_ranks.control)
    return int(flag)


def together() -> None:
    """Wait until every rank is here."""
    largest(0)


def device_of(name: str) -> str:
    """The device of this rank where train.device is `name`: of several GPUs its own, whichever is named, as a run that
    is gone on with names rank 0's."""
    if n_ranks() > 1 and (name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{_number('LOCAL_RANK')}"
    return name


def first_then_others(function: Callable[[], T]) -> T:
    """Call it on rank 0, and when that is done on the others: what it makes on disk is made once. However long it
    takes."""
    if n_ranks() == 1:
        return function()
    assert _ranks.store is not None
    key = f"turn/{_ranks.store.add(f'turns/{rank()}', 1)}"
    if rank() == 0:
        value = function()
        _ranks.store.set(key, "done")
        return value
    _ranks.store.wait([key], timedelta(days=7))
    return function()


def first_then_tell(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What it returns on rank 0, on all ranks; the others do not call it."""
    return from_first(function() if rank() == 0 else None, group)  # type: ignore[return-value]


def check_alike(facts: dict[str, Any]) -> None:
    """Refuse ranks of which one says other than rank 0 of what must be alike. Raises `BadInput` on all, naming the
    first fact, the rank and both values."""
    all_facts = shared(facts)
    for number, of_rank in enumerate(all_facts):
        for name, value in all_facts[0].items():
            if of_rank.get(name) != value:
                raise BadInput(
                    f"{_ranks.places[number]} has {name} {of_rank.get(name)}, and rank 0 {value}: all ranks must have "
                    "the same."
                )


# The end


def is_first_to_tell() -> bool:
    """Whether a problem of this process is for it to tell: of ranks, the first one that has any."""
    if not started_by_many():
        return True
    try:
        if _ranks.store is None:
            _ranks.store = _met()
        return _ranks.store.add("problems", 1) == 1
    except (RuntimeError, ValueError, BadInput):
        return rank() == 0 or not dist.is_initialized()


def _met() -> Store:
    """torchrun's store, for a rank that has a problem before it met the others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise BadInput("no store is there before rank 0 has one")
    return _store(_number("RANK"), _number("WORLD_SIZE"))


def of_the_ranks(error: BaseException) -> BadInput | None:
    """An error of a transfer in a sentence that says which rank is gone or did not come; None for any other."""
    if n_ranks() == 1 or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    assert _ranks.store is not None
    with suppress(RuntimeError):
        if _ranks.store.check(["problems"]):
            return BadInput("another rank has told what is wrong")
    missing, lives = _missing()
    if not missing:
        words = str(error).strip().splitlines()[0].rstrip(".")
        return BadInput(
            f"{_ranks.places[rank()]}: a transfer between ranks failed ({words}), and all of them are alive."
        )
    who = ", ".join(_ranks.places[number] for number in missing)
    happened = f"did not come within parallel.timeout={_ranks.seconds:g} s" if lives else "is gone, or stopped"
    return BadInput(f"{who} {happened}: see what happened there, and go on from the last checkpoint with resume=true.")


def _missing() -> tuple[list[int], bool]:
    """The ranks that give no sign of life, or, where all live (True), that have not missed anybody themselves, as they
    never came to the transfer that the others gave up. Where there is no store, rank 0 is gone, which kept it."""
    assert _ranks.store is not None
    everyone = range(n_ranks())
    try:
        _ranks.store.set(f"misses/{rank()}", "somebody")
        before, deadline = [_ranks.store.add(f"beats/{number}", 0) for number in everyone], time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            time.sleep(BEAT / 4)
            beats = [_ranks.store.add(f"beats/{number}", 0) for number in everyone]
            if all(now > then for now, then in zip(beats, before, strict=True)) and _all_miss(everyone):
                return [], True
        still = [number for number in everyone if beats[number] == before[number]]
        return still or [number for number in everyone if not _all_miss([number])], not still
    except RuntimeError:
        return [0], False


def _all_miss(numbers: Iterable[int]) -> bool:
    assert _ranks.store is not None
    return all(_ranks.store.check([f"misses/{number}"]) for number in numbers)


@contextmanager
def parting() -> Iterator[None]:
    """What a command does is inside. One of several ranks ends there, at once and with the status that the command
    would have ended with: threads of a backend that are still there at an ordinary exit make it abort now and then."""
    if not started_by_many():
        yield
        return
    status = 0
    try:
        yield
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
