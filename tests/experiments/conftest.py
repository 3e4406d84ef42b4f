"""Fixtures of the tests of experiments/."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hydra.core.global_hydra import GlobalHydra

import experiments.train
from moe.config.run import Config
from tests.small_runs import train


@pytest.fixture
def command(monkeypatch, tmp_path):
    """(arguments) -> (exit status, stdout, stderr, the configs that reached training) of `experiments.train`."""
    monkeypatch.chdir(tmp_path)  # Hydra notes a sweep in runs/multirun.yaml

    def run(*arguments: str, really: bool = False):
        out, err = io.StringIO(), io.StringIO()
        configs: list[Config] = []
        monkeypatch.setattr(experiments.train, "train", lambda cfg: train(cfg) if really else configs.append(cfg))
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        GlobalHydra.instance().clear()
        status = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                experiments.train.main()
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue(), configs

    return run
