"""In place of the interpreters that `Pool` starts, by `monkeypatch.setattr(pool, "subprocess", forked)`: processes
forked from one that has imported torch already. They are claimed, told and killed as any other process."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from unittest import mock

from experiments.study import worker
from moe.run import machine

PIPE = subprocess.PIPE


class Popen:
    """A worker's process, as far as `Pool` asks."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        assert command[:3] == [sys.executable, "-m", "experiments.study.worker"], command
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.study.worker"])
        their_stdin, self.stdin = context.Pipe(duplex=False)
        stdout, their_stdout = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(command[3:], env, their_stdin, their_stdout))
        self.process.start()
        self.pid = self.process.pid
        for end in (their_stdin, their_stdout):
            end.close()
        self.stdout = os.fdopen(os.dup(stdout.fileno()), "rb")

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> None:
        self.process.join()

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)


def work(arguments: list[str], env: dict[str, str], stdin: Connection, stdout: Connection) -> None:
    """What the process does: `experiments.study.worker`, without what only costs time here."""
    os.setsid()
    os.environ.update(env)
    for end, number in ((stdin, 0), (stdout, 1)):
        os.dup2(end.fileno(), number)
        end.close()
    with (
        mock.patch("os.fsync"),
        mock.patch.object(machine, "reset_peak_memory"),
        mock.patch.object(worker, "PAUSE", 0.1),
    ):
        sys.exit(worker.main(arguments))
