"""Claims about a run of two ranks as a job: its time is up in the middle, it is queued again and comes to its end."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from experiments import submit
from moe.run.jsonl import read_lines

WORDS = (
    "model=cpu-nano data=text data.path={0}/t.txt data.cache={0}/cache data.val_fraction=0.45 tokenizer=byte "
    "train.steps={1} train.batch_size=4 train.eval_every=0 train.eval_tokens=512 train.precision=fp32 train.threads=1 "
    "train.device=cpu log.every=1 run={0}/run parallel=experts model.context=32 model.n_layers=2 model.d_model=32 "
    "model.n_heads=2 model.n_kv_heads=2 model.d_ff=32 model.moe.d_expert=32"
)


def submitted(folder: Path, *overrides: str) -> subprocess.Popen:
    (folder / "t.txt").write_text("".join(f"Line {i} of a text.\n\n" for i in range(2000)))
    words = [sys.executable, "-m", "experiments.submit", f"folder={folder}/jobs", "executor=local", *overrides]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def metrics(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    with suppress(OSError, ValueError):
        return read_lines(path) if path.exists() else []
    return []


def test_when_its_time_is_up_a_job_saves_is_queued_again_and_comes_to_its_end(tmp_path):
    steps = 60
    process = submitted(tmp_path, f"command={WORDS.format(tmp_path, steps)}", "tasks=2")
    while len(metrics(tmp_path)) < 3 and process.poll() is None:
        with suppress(subprocess.TimeoutExpired):  # until it takes steps
            process.wait(0.1)
    for task in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "submitit.core._submit" in " ".join(task.cmdline()):
                task.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=200)[0]
    logs = "".join(path.read_text() for path in (tmp_path / "jobs").glob("*_0_log.*"))
    assert process.returncode == 0, output + logs
    assert "2 ranks, logs in" in output
    assert (tmp_path / "run" / "summary.json").exists()
    assert "Stopped after step" in logs
    assert "Requeued job" in logs
    assert [line["step"] for line in metrics(tmp_path)] == list(range(steps + 1))


def test_a_run_that_fails_is_a_failed_job(tmp_path):
    process = submitted(tmp_path, f"command={WORDS.format(tmp_path, 2)} model.moe.k=99", "tasks=2")
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2
    assert "failed: RuntimeError: the training ended with status 2; its logs are in" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "command= is needed"),
        (["command=model=cpu-nano"], "needs run=FOLDER"),
        (["command=run=x", "executor=pbs"], "executor=pbs is not one of slurm, local"),
        (["command=run=x", "nodes=0"], "nodes=0 is out of range"),
    ],
)
def test_what_cannot_be_submitted_is_a_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["submit", f"folder={tmp_path}/jobs", "executor=local", *words])
    with pytest.raises(SystemExit, match="2"):
        submit.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()
