"""Ranks on this machine: processes that have met over gloo, and call what they are told to, all of them together."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from time import monotonic
from types import TracebackType
from typing import Any

from moe.errors import BadInput

PRELOADED = ["moe.train.loop", "moe.train.parallelize", "torch.distributed.checkpoint", "torch._dynamo"]


class RanksFailed(RuntimeError):
    """What was called on ranks raised, or did not end in time: which ranks, and their tracebacks."""


class LocalRanks:
    """Use as a context manager: afterwards no process is left. `patience`: seconds that a transfer waits for a rank."""

    def __init__(self, n: int, patience: float = 60.0) -> None:
        # What they import is imported once, in a process of its own: a fork of this one would have the locks of threads
        # that it has not.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, n, port, patience, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Kill them all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """What a function of a module returns on each rank. Raises `RanksFailed` for what it raises there, and after
        `timeout` seconds: then these ranks are of no more use, and are ended."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(answers) < len(self.pipes) and not any(isinstance(answer, _Raised) for answer in answers.values()):
            left = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready: list[Any] = wait(list(left), max(0.0, deadline - monotonic()))
            for pipe in ready:
                try:
                    answers[left[pipe]] = pipe.recv()
                except EOFError:
                    answers[left[pipe]] = _Raised("it died")
            if not ready:
                self.end()
                missing = ", ".join(map(str, sorted(left.values())))
                raise RanksFailed(f"no answer of ranks {missing} in {timeout:g} s")
        raised = [f"rank {rank}: {answer.trace}" for rank, answer in answers.items() if isinstance(answer, _Raised)]
        if raised:
            self.end()
            raise RanksFailed("\n".join(raised))
        return [answers[rank] for rank in range(len(self.pipes))]


class _Raised:
    """A traceback, or what else stands for an answer."""

    def __init__(self, trace: str) -> None:
        self.trace = trace


def _rank(rank: int, n: int, port: int, patience: float, pipe: Connection) -> None:
    """A rank's life: meet, and answer calls until it is killed."""
    import torch  # in the new process alone

    from moe.parallel import launch  # as above

    contract = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in contract.items()} if n > 1 else {})
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        try:
            launch.join("cpu", patience)
        except BadInput as bad:
            pipe.send(_Raised(str(bad)))
            return
        while True:
            function, arguments = pipe.recv()
            try:
                answer = function(*arguments)
            except Exception:
                answer = _Raised(traceback.format_exc())
            pipe.send(answer)
