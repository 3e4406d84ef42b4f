"""The command of the benchmarks, run in this process: for the tests of experiments/suites/."""

import sys

from experiments import bench


def command(monkeypatch, *overrides):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", *overrides])
    bench.main()
