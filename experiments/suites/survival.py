"""Suite survival: what a worker's end does to a run of two ranks under torchrun, which starts it again.

A tiny model trains for some steps; at one of them, in the first attempt alone, rank 1 is killed, raises, hangs, is
stopped, is asked to end, has no room on its disk, or is lost with its machine. A row says what was told, whether the
run went on to its end by itself (one that was asked to end: when it was started again), whether every tensor of its
last checkpoint is that of a run that nothing happened to, and the seconds from the fault to the first step taken again.
Where a machine is lost one rank goes on alone, and sums are made in another order.

    python -m experiments.bench suite=survival out=experiments/results/survival.jsonl
"""

import functools
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import moe.train.loop
from experiments.suites.cases import Case, Wrong
from experiments.suites.timing import relative_error
from moe.parallel.collectives import rank
from moe.run import checkpoint, shards
from moe.run.jsonl import read_lines

HEADINGS = ("fault", "at", "told", "ended by itself", "same to the bit", "seconds to go on")
FAULTS = (
    "none",
    "SIGKILL",
    "exception",
    "hang",
    "SIGSTOP",
    "SIGTERM to one",
    "SIGTERM to all",
    "disk full",
    "node lost",
)
STEPS, AT = 12, 7  # steps of the run, and the one at which it happens
SETTINGS = (
    "model=cpu-nano", "data=text", "data.val_fraction=0.45", f"train.steps={STEPS}", "train.eval_every=0",
    "train.eval_tokens=512", "checkpoint.every=3", "train.precision=fp32", "train.threads=1", "train.device=cpu",
    "tokenizer=byte", "train.batch_size=4", "log.every=1",
    "parallel.timeout=6", "parallel=experts", "resume=true",
)  # fmt: skip


class Settings(NamedTuple):
    """What is tried."""

    faults: tuple[str, ...]


def settings(device: torch.device, full: bool, rounds: int) -> Settings:
    """Every fault; in small the first two."""
    return Settings(FAULTS if full else FAULTS[:2])


def cases(asked: Settings) -> Iterator[Case]:
    """A case for each fault."""
    for fault in asked.faults:
        yield Case({"suite": "survival", "fault": fault}, functools.partial(measured, fault))


def measured(fault: str) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        run, tensors = trained(Path(place), fault)
    if not run["ended"]:
        raise Wrong(f"the run did not come to its end: {run['told']}")
    expected = unharmed()
    assert tensors.keys() == expected.keys(), "another checkpoint"
    run["same"] = all(torch.equal(tensors[name], value) for name, value in expected.items())
    run["error"] = max(relative_error(tensors[name].double(), value.double()) for name, value in expected.items())
    return run


@functools.cache
def unharmed() -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors of the run that nothing happens to."""
    with tempfile.TemporaryDirectory() as place:
        return trained(Path(place), "none")[1]


def trained(place: Path, fault: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train in `place` with a fault under torchrun, and again where it ended saved; what came of it, and the tensors of
    its last checkpoint."""
    (place / "text.txt").write_text("".join(f"Line {i} of a text.\n\n" for i in range(2000)))
    told = launched(place, fault)
    if "SIGTERM" in fault:  # it ended as asked, saved, and is started anew
        told += launched(place, fault)
    run = place / "run"
    path = checkpoint.latest(run / "checkpoints", lambda line: None)
    times = [float(line) for line in (place / "times").read_text().split()] if (place / "times").exists() else []
    row = {
        "told": sentence(told).replace(str(place), "."),
        "ended": (run / "summary.json").exists(),
        "steps": len(read_lines(run / "metrics.jsonl")) - 1,
        "to_go_on": round(times[1] - times[0], 1) if len(times) > 1 else None,
    }
    return row, shards.read(path) if path else {}


def launched(place: Path, fault: str) -> str:
    """Both streams of torchrun, or of two of them on what count as two machines."""
    words = [f"data.path={place / 'text.txt'}", f"data.cache={place / 'cache'}", f"run={place / 'run'}", *SETTINGS]
    module = ["-m", "experiments.suites.survival", fault, str(place), *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=2", "--monitor-interval=0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = functools.partial(
        subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if fault != "node lost":
        process = run([*torchrun, "--standalone", "--nproc-per-node=2", *module])
        return str(process.communicate(timeout=300)[0])
    # The first machine, where they meet, may go on alone; the second is lost, its agent and its worker at once.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=machines"]
    rendezvous += ["--rdzv-conf=last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=2"]
    first = run([*torchrun, *rendezvous, "--nproc-per-node=1", *module])
    while not is_open(port) and first.poll() is None:
        time.sleep(0.05)
    second = run([*torchrun, *rendezvous, "--nproc-per-node=1", *module])
    while not (place / "fault").exists() and first.poll() is None:
        time.sleep(0.05)
    agent = psutil.Process(second.pid)
    for process in (*agent.children(recursive=True), agent):
        process.kill()
    second.wait()
    return str(first.communicate(timeout=300)[0])


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def sentence(output: str) -> str:
    """What a person was told of the fault: the first line of an error, or of an end that was asked for; else what
    torchrun says of the worker that it missed."""
    lines = [
        line.removeprefix("error: ") for line in output.splitlines() if line.startswith(("error: ", "Stopped after"))
    ]
    ended = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", output)
    if not lines and ended:
        return f"torchrun: local rank {ended[2]} ended with {ended[1]}"
    return lines[0] if lines else ""


def harm(fault: str, place: Path) -> None:
    """What happens to this rank."""
    match fault:
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exception":
            raise KeyError("a mistake in the code")
        case "hang":
            time.sleep(3600)
        case "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "SIGTERM to one":
            os.kill(os.getpid(), signal.SIGTERM)
        case "SIGTERM to all":
            os.kill(os.getppid(), signal.SIGTERM)
        case "disk full":
            write = shards.write

            def no_room(folder: Path, *arguments: Any) -> None:
                setattr(shards, "write", write)  # noqa: B010 — in place of another
                write(folder, *arguments)
                raise OSError(28, "No space left on device")

            setattr(shards, "write", no_room)  # noqa: B010


def main() -> None:
    """Train as `experiments.train` does, but for the step at which a fault happens to rank 1."""
    fault, place = sys.argv[1], Path(sys.argv[2])
    sys.argv[1:3] = []
    take_step = moe.train.loop.take_step

    resumed = (place / "fault").exists()

    def watched(state: Any, *arguments: Any) -> Any:
        done = take_step(state, *arguments)
        if resumed and rank() == 0:
            with open(place / "times", "a") as times:
                times.write(f"{time.time()}\n")
        if state.step == AT and not resumed and rank() == 1:
            (place / "times").write_text(f"{time.time()}\n")
            (place / "fault").write_text(fault)
            harm(fault, place)
        return done

    setattr(moe.train.loop, "take_step", watched)  # noqa: B010
    runpy.run_module("experiments.train", run_name="__main__")


def shortened(told: str) -> str:
    """The part of a sentence that says what is wrong, without numbers that are of this machine."""
    told = re.sub(r"process \d+ on [\w.-]+", "process … on …", told).partition(": see what happened")[0]
    return re.sub(r"it needs .*", "…", told).partition(". Go on with")[0]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = row["fault"], f"step {AT}, rank 1"
    if row["status"] != "measured":
        return *head, row["error"][:60], row["status"], "", ""
    seconds = "" if row["to_go_on"] is None else f"{row['to_go_on']:.1f}"
    same = "yes" if row["same"] else f"to {row['error']:.0e}"
    return *head, shortened(row["told"]), "yes" if row["ended"] else "no", same, seconds


if __name__ == "__main__":
    main()
