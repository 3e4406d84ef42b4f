"""The command for a GPU machine: it starts anywhere, goes on where it stopped, and says what all rows come to."""

import json
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import gpu_evidence
from experiments.suites import cases, evidence, facts, kernel_checks, layer_checks
from moe.errors import BadInput
from tests import fake_cuda

pytestmark = fake_cuda.interpreted
ROOT = Path(__file__).parents[2]
SMOKE = ("--device", "cpu", "--sizes", "smoke")


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _child(folder, stage, *given):
    """Run one stage here."""
    with pytest.raises(SystemExit) as ended:
        gpu_evidence.main(["--out", str(folder), "--stage", stage, "--child", *SMOKE, *given])
    return ended.value.code


WITHOUT = """
import sys
for name in ("hydra", "omegaconf", "rustbpe", "ftfy", "bs4", "datasketch", "zstandard", "transformers", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
from experiments import gpu_evidence
gpu_evidence.main(["--out", sys.argv[1], "--stage", "kernels", "--child", "--device", "cpu", "--sizes", "smoke"])
"""


def test_it_runs_where_hydra_and_whatever_a_gpu_machine_lacks_are_absent(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(_lines(tmp_path / "gpu-kernels.jsonl")) == 6


def test_a_row_says_where_it_was_made(tmp_path, monkeypatch):
    with fake_cuda.install(monkeypatch), pytest.raises(SystemExit, match="0"):
        gpu_evidence.main(
            ["--out", str(tmp_path), "--stage", "kernels", "--child", "--sizes", "smoke", "--commit", "x"]
        )
    for row in _lines(tmp_path / "gpu-kernels.jsonl"):
        assert row["device"] == "NVIDIA H100 80GB HBM3"
        assert {"driver", "versions", "commit", "dirty", "code", "stage", "seconds", "status"} <= row.keys()
        assert row["command"] == "python -m experiments.gpu_evidence --out DIR --stage kernels --sizes smoke"
        assert str(tmp_path) not in json.dumps(row)


def _started(folder, *given, stage="kernels"):
    """The command in a process of its own, once its first row is written."""
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_evidence",
        "--out",
        str(folder),
        "--stage",
        stage,
        *SMOKE,
        *given,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = folder / f"gpu-{stage}.jsonl"
    until = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n")):
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def test_a_kill_leaves_whole_lines_and_the_next_run_makes_the_rest(tmp_path):
    process = _started(tmp_path, "--child")
    process.kill()
    process.communicate()
    path = tmp_path / "gpu-kernels.jsonl"
    before = _lines(path)
    assert 1 <= len(before) < 6
    assert _child(tmp_path, "kernels") == 0
    after = _lines(path)
    assert after[: len(before)] == before
    assert len([row for row in after if row["status"] == "measured"]) == 6
    assert [row["error"] for row in after if row["status"] != "measured"] in (
        [], ["the process died while measuring this"],
    )  # fmt: skip
    assert not path.with_suffix(".running").exists()
    assert _child(tmp_path, "kernels") == 0
    assert _lines(path) == after


def test_another_commit_makes_all_rows_again(tmp_path, monkeypatch):
    assert _child(tmp_path, "kernels") == 0
    monkeypatch.setattr(facts.machine, "git_state", lambda: facts.machine.GitState("another", False))
    assert _child(tmp_path, "kernels") == 0
    commits = [row["commit"] for row in _lines(tmp_path / "gpu-kernels.jsonl")]
    assert commits.count("another") == 6
    assert len(commits) == 12


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(tmp_path):
    process = _started(tmp_path, stage="correctness")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in out
    checks = layer_checks.settings(torch.device("cpu"), full=False)
    n_rows = sum(1 for suite in (kernel_checks, layer_checks) for _ in suite.cases(checks))
    assert 1 <= len(_lines(tmp_path / "gpu-correctness.jsonl")) < n_rows


def test_what_there_is_no_time_for_is_listed(tmp_path):
    assert _child(tmp_path, "kernels", "--budget", "0.0001") == 0
    found = _lines(tmp_path / "gpu-kernels.jsonl")
    assert {row["status"] for row in found} == {"left out"}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--device", "cpu"], "only at --sizes smoke"),
        ([], "--device=cuda is not here"),
        (["--device", "tpu"], "--device=tpu is no device"),
        ([*SMOKE, "--budget", "0"], "--budget 0 is out of range"),
        ([*SMOKE, "--stage", "kernel"], "--stage kernel is not one of correctness, kernels, layer, train_step, tune."),
        ([*SMOKE, "--bugdet", "9"], "--bugdet is no option; did you mean --budget."),
        ([*SMOKE, "--budget", "long"], "--budget long must be a number."),
        ([*SMOKE, "--budget"], "--budget needs a value."),
        ([*SMOKE, "kernels"], "kernels is no word of this command, which takes options alone; accepted: --budget, "),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        gpu_evidence.main(["--out", str(tmp_path), *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_the_folder_is_needed(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_evidence.main([])
    assert capsys.readouterr().err == "error: --out is needed: folder for rows, created if it is not there.\n"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        gpu_evidence.main(["--out", str(tmp_path / "file"), *SMOKE])
    assert "is not a folder" in capsys.readouterr().err


def _arguments(folder, *given):
    return gpu_evidence.parser().parse_args(["--out", str(folder), *SMOKE, *given])


def test_a_process_that_dies_is_started_again_and_its_row_noted(tmp_path, monkeypatch):
    statuses = iter([-11, gpu_evidence.LOST, 0])
    monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left: next(statuses))
    (tmp_path / "gpu-layer.running").write_text('{"suite": "layer", "shape": "x"}')
    assert gpu_evidence.whole(_arguments(tmp_path), "layer")
    (row,) = _lines(tmp_path / "gpu-layer.jsonl")
    assert (row["shape"], row["died"], row["stage"]) == ("x", True, "layer")


def test_a_stage_ends_when_its_time_is_used_up_or_its_code_is_broken(tmp_path, monkeypatch):
    arguments = _arguments(tmp_path)
    for status, whole in ((1, False), (gpu_evidence.REFUSED, False), (0, True)):
        monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left, status=status: status)
        assert gpu_evidence.whole(arguments, "layer") == whole
    tries = []
    monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left: tries.append(left) or -9)
    assert not gpu_evidence.whole(arguments, "layer")
    assert len(tries) == gpu_evidence.RESTARTS
    clock, statuses = iter([0.0, 10.0, 600.0]), iter([-9, 0])
    monkeypatch.setattr(gpu_evidence, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left: tries.append(left) or next(statuses))
    assert gpu_evidence.whole(arguments, "layer")
    assert tries[-2:] == [490.0, 0.01]  # time enough to list what is left out


def test_a_row_that_does_not_end_is_killed(tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gpu_evidence.sys, "executable", str(program))
    monkeypatch.setattr(gpu_evidence, "GRACE", 0.1)
    assert gpu_evidence.attempt(_arguments(tmp_path), "layer", 0.1) == -signal.SIGKILL
    assert "is killed" in capsys.readouterr().out


def test_a_device_that_is_lost_ends_the_process_with_its_own_status(tmp_path, monkeypatch):
    def lost(*given):
        raise cases.DeviceLost("x")

    monkeypatch.setattr(gpu_evidence, "run", lost)
    assert _child(tmp_path, "kernels") == gpu_evidence.LOST


def test_all_stages_run_in_processes_of_their_own_and_a_summary_follows(tmp_path, monkeypatch, capsys):
    """Each as a call of the stage here; the processes are tested above."""
    seen = []

    def attempt(arguments, name, left):
        child = _arguments(arguments.out, "--stage", name, "--child", "--budget", "0.0001")
        seen.append(name)
        return gpu_evidence.stage(child)

    monkeypatch.setattr(gpu_evidence, "attempt", attempt)
    gpu_evidence.main(["--out", str(tmp_path), *SMOKE])
    assert seen == list(evidence.STAGES)
    out = capsys.readouterr().out
    assert "roofline.png: not drawn, no measured rows" in out
    for name in evidence.STAGES:
        assert f"== {name}\n" in out
        assert (tmp_path / f"gpu-{name}.jsonl").exists()
    assert (tmp_path / "tuning-interpreter.jsonl").exists()
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_stage_that_broke_off_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left: int(name == "layer"))
    with pytest.raises(SystemExit, match="1"):
        gpu_evidence.main(["--out", str(tmp_path), *SMOKE])
    assert "error: layer broke off" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "roofline.png"), BadInput("it is damaged.")])
def test_a_summary_that_cannot_be_made_is_a_sentence(error, tmp_path, monkeypatch, capsys):
    def refuse(rows, path):
        raise error

    monkeypatch.setattr(gpu_evidence, "attempt", lambda arguments, name, left: 0)
    monkeypatch.setattr(gpu_evidence.roofline, "draw", refuse)
    with pytest.raises(SystemExit, match="2"):
        gpu_evidence.main(["--out", str(tmp_path), *SMOKE])
    said = capsys.readouterr().err
    assert said.startswith("error: roofline.png: No space left on device: free" if error.args[1:] else "error: it is")
    assert said.count("\n") == 1
