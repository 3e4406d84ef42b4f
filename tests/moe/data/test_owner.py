"""Claims about temporary names: whose a file is, and which may go."""

import os
from pathlib import Path

from moe.data import owner
from tests.small_runs import left_by_others


def test_only_what_dead_processes_left_is_removed(tmp_path):
    names = left_by_others(tmp_path / "summary.json")
    keep = [tmp_path / name for name in ("summary.json", "mine.tmp-1", "mine.tmp-0123abcd-1-1-more")]
    for path in (*names.values(), *keep):
        path.touch()
    owner.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {*keep, names["ours"], names["live"], names["elsewhere"]}
    os.utime(names["elsewhere"], (0, 0))
    owner.remove_leftovers(tmp_path, ours=True)
    assert set(tmp_path.iterdir()) == {*keep, names["live"]}
    owner.remove_leftovers(tmp_path / "missing")


def test_a_process_that_waits_to_be_noticed_is_dead():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it ended, and nobody has taken note
    zombie = owner.Owner(owner.this_place(), pid, 1)
    assert owner._began(pid) == -1
    assert zombie.is_alive() is False
    os.waitpid(pid, 0)
    assert owner.this_process().is_alive() is True


def test_a_temporary_name_names_this_process():
    name = owner.temporary(Path("runs") / "run").name
    assert name.startswith("run.tmp-")
    assert name.split("-")[2] == str(os.getpid())
