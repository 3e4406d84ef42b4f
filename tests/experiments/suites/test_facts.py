"""What a number needs beside it."""

import subprocess

import torch

from experiments.suites import facts

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_facts_name_device_versions_commit_and_code():
    found = facts.facts(CPU, commit="ignored where there is a .git")
    assert found.keys() == {"device", "driver", "versions", "commit", "dirty", "code", "command"}
    assert found["driver"] is None
    assert {"python", "torch", "triton"} <= found["versions"].keys()
    assert len(found["commit"]) == 40
    assert found["command"].startswith("python -m experiments.")


def test_a_copy_without_git_takes_the_commit_it_is_given(monkeypatch):
    monkeypatch.setattr(facts.machine, "git_state", lambda: facts.machine.GitState(None, None))
    found = facts.facts(CPU, commit="abc")
    assert (found["commit"], found["dirty"]) == ("abc", None)
    assert facts.facts(CPU)["commit"] is None


def test_the_code_is_the_kernels_the_tiles_and_the_model(tmp_path, monkeypatch):
    for name in ("kernels/a.py", "kernels/tuning.jsonl", "moe/b.py", "moe/room/b.py", "experiments/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    before = facts.code()
    (tmp_path / "experiments" / "c.py").write_text("two")
    assert facts.code() == before
    for name in ("kernels/a.py", "kernels/tuning.jsonl", "moe/b.py", "moe/room/b.py"):
        (tmp_path / name).write_text("two")
        assert facts.code() != before
        before = facts.code()


def test_the_driver_is_asked_of_nvidia_smi(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, "580.159.04\n")
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: answer)
    assert facts.driver(CUDA) == "580.159.04"
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: subprocess.CompletedProcess([], 1, ""))
    assert facts.driver(CUDA) is None


def test_without_nvidia_smi_the_driver_is_unknown(monkeypatch):
    def missing(*given, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert facts.driver(CUDA) is None
