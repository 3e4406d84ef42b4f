"""Functions on several ranks, for tests: processes are started once for a file of tests (`conftest.ranks_end`), and
kept while nothing goes wrong with them."""

import atexit
from typing import Any

from experiments.suites.local_ranks import LocalRanks, RanksFailed

_kept: dict[int, LocalRanks] = {}


@atexit.register
def end_ranks() -> None:
    """End those that are kept: groups that have met have threads, which take time as long as they live."""
    while _kept:
        _kept.popitem()[1].end()


def run_ranks(n: int, function: Any, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """What a function of a module returns on each of `n` ranks. Raises `RanksFailed` with their tracebacks."""
    if n not in _kept:
        _kept[n] = LocalRanks(n)
    try:
        return _kept[n].call(function, *arguments, timeout=timeout)
    except RanksFailed:
        _kept.pop(n).end()
        raise
