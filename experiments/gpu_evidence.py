"""Everything that is to be known about the kernels on a GPU, in stages that can be repeated and cut short.

    python -m experiments.gpu_evidence --out DIR                              # all stages
    python -m experiments.gpu_evidence --out DIR --stage layer --budget 300   # one, starting nothing new after 300 s
    python -m experiments.gpu_evidence --out DIR --device cpu --sizes smoke   # the same code in Triton's interpreter

Stages: correctness (every kernel and the layer against float64, reruns, graphs, compile, sanitizer), kernels, layer,
train_step, tune; a roofline is drawn of what the layer's rows say. DIR gets gpu-<stage>.jsonl, a line per row with
device, versions and commit, tuning-<architecture>.jsonl and roofline.png: copy them into experiments/results/.

Run it again and it goes on: rows of the same commit, code and device are kept. Every stage runs in a process of its
own, which is started again when a kernel takes the device down with it; the row that did is noted, and after the second
time left alone. Needs neither Hydra nor OmegaConf.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.pages import tables
from experiments.suites import evidence, facts, kernel_checks, layer_checks, roofline, timing, tune
from experiments.suites import kernels as kernels_suite
from experiments.suites import layer as layer_suite
from experiments.suites import train_step as train_step_suite
from experiments.suites.cases import Absent, Case, DeviceLost, Rows, run
from moe.errors import BadInput, of_the_machine
from moe.run import machine, terminal
from moe.run.command_line import Options

REFUSED, LOST, INTERRUPTED = 2, 75, 130  # exit statuses
GRACE = 40.0  # seconds that a row may go on after its stage's time is used up
RESTARTS = 10
MODELS = ("gpu-300m", "gpu-1b")  # presets of stage train_step


def main(given: Sequence[str] | None = None) -> None:
    """Run the stages; exit status 2 for what cannot be run, 1 when a stage broke off."""
    terminal.begin()
    arguments = parser().parse_args(given)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        check(arguments)
        if arguments.child:
            sys.exit(stage(arguments))
        broken = [name for name in arguments.stage if not whole(arguments, name)]
        conclude(arguments)
    except (BadInput, OSError, MemoryError) as error:
        refusal = error if isinstance(error, BadInput) else of_the_machine(error)
        print(f"error: {terminal.printable(str(refusal))}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("interrupted: every row that was done is written; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    if broken:
        print(f"error: {', '.join(broken)} broke off; the same command goes on.", file=sys.stderr)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = Options(__doc__)
    options.add_argument("--out", type=Path, required=True, help="folder for rows, created if it is not there")
    options.add_argument("--stage", nargs="+", choices=evidence.STAGES, default=list(evidence.STAGES))
    options.add_argument("--sizes", choices=("full", "smoke"), default="full", help="smoke: tiny, to see that it runs")
    options.add_argument("--device", default="cuda", help="cuda, or cpu for Triton's interpreter")
    options.add_argument("--budget", type=float, default=500.0, help="seconds per stage after which no row is started")
    options.add_argument("--commit", help="of the code, where the tree is a copy without its .git")
    options.add_argument("--counts", type=Path, help="routing/counts.jsonl of a run, for the recorded load")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return options


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be run. Raises `BadInput`."""
    device = timing.find_device(arguments.device, "--device")
    if not arguments.budget > 0:
        raise BadInput(f"--budget {arguments.budget:g} is out of range: accepted are seconds above 0.")
    if device.type == "cpu" and arguments.sizes == "full":
        raise BadInput("--device cpu runs the kernels in Triton's interpreter, and only at --sizes smoke.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise BadInput(f"--out {arguments.out} is not a folder.")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are defined, which is later, here and in children
    instead = "--device cpu --sizes smoke runs the code in Triton's interpreter."
    timing.check_kernels("gpu_evidence", device, arguments.sizes == "full", instead)


def whole(arguments: argparse.Namespace, name: str) -> bool:
    """Run a stage in processes of its own until it has gone through its rows; False when it did not. One more, when the
    time is used up, lists what is left out."""
    start = time.monotonic()
    print(f"== {name}", flush=True)
    for _ in range(RESTARTS):
        left = max(0.01, arguments.budget - (time.monotonic() - start))
        status = attempt(arguments, name, left)
        if status in (0, REFUSED):
            return status == 0
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status == 1:  # a mistake in this code, not in a row: it would be made again
            return False
        Rows(evidence.path_of(arguments.out, name), common(arguments, name), resume=True)  # notes what it died of
        print(f"{name}: the process ended with status {status}", flush=True)
    return False


def attempt(arguments: argparse.Namespace, name: str, left: float) -> int:
    """One process for what is left of a stage: its exit status, negative for a signal."""
    command = [sys.executable, "-m", "experiments.gpu_evidence", "--child", "--out", str(arguments.out.resolve())]
    command += ["--stage", name, "--sizes", arguments.sizes, "--device", arguments.device, "--budget", f"{left:.2f}"]
    command += ["--commit", arguments.commit] if arguments.commit else []
    command += ["--counts", str(arguments.counts.resolve())] if arguments.counts else []
    child = subprocess.Popen(command, cwd=facts.ROOT)
    try:
        return child.wait(left + GRACE)
    except subprocess.TimeoutExpired:
        print(f"{name}: a row went on for {GRACE:.0f} s after the time was used up; its process is killed", flush=True)
        child.kill()
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


def stage(arguments: argparse.Namespace) -> int:
    """Go through one stage's rows in this process and print its table; the exit status."""
    (name,) = arguments.stage
    device = timing.find_device(arguments.device, "--device")
    machine.keep_freed_memory()
    rows = Rows(evidence.path_of(arguments.out, name), common(arguments, name), resume=True)
    build, suite = SUITES[name]
    try:
        cases = build(arguments, device, rows)
        measured = run(cases, rows, device, arguments.budget, lambda line: print(line, flush=True))
    except DeviceLost as lost:
        print(f"{name}: the device is lost: {lost}", flush=True)
        return LOST
    if suite is train_step_suite:
        tables.print_table(*train_step_suite.table(measured))
    else:
        tables.print_table(suite.HEADINGS, map(suite.cells, measured))
    return 0


def common(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What every row of a stage carries. The command leaves out where the rows went."""
    device = timing.find_device(arguments.device, "--device")
    words = ["python -m experiments.gpu_evidence --out DIR --stage", name, "--sizes", arguments.sizes]
    return facts.facts(device, arguments.commit) | {"command": " ".join(words), "stage": name}


def correctness(arguments: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[Case]:
    """Kernel by kernel, then the layer."""
    settings = layer_checks.settings(device, arguments.sizes == "full")
    yield from itertools.chain(kernel_checks.cases(settings), layer_checks.cases(settings))


def kernels(arguments: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[Case]:
    """Gate, plan, combine."""
    yield from kernels_suite.cases(kernels_suite.settings(device, arguments.sizes == "full"))


def layer(arguments: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[Case]:
    """Experts against peers."""
    yield from layer_suite.cases(layer_suite.settings(device, arguments.sizes == "full", counts=arguments.counts))


def train_step(arguments: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[Case]:
    """Whole steps, preset by preset."""
    full = arguments.sizes == "full"
    ceilings = timing.ceilings(device, full=full)
    for name in MODELS if full else ("smoke",):
        yield from train_step_suite.cases(train_step_suite.settings(device, full, name, ceilings))


def tuned(arguments: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[Case]:
    """Candidate tiles."""
    until = time.monotonic() + arguments.budget
    yield from tune.cases(tune.settings(device, arguments.sizes == "full", kept=rows.kept, until=until))


Build = Callable[[argparse.Namespace, torch.device, Rows], Iterator[Case]]
SUITES: dict[str, tuple[Build, Any]] = {
    "correctness": (correctness, layer_checks),
    "kernels": (kernels, kernels_suite),
    "layer": (layer, layer_suite),
    "train_step": (train_step, train_step_suite),
    "tune": (tuned, tune),
}


def conclude(arguments: argparse.Namespace) -> None:
    """Draw the roofline and print what all rows of this code come to."""
    rows = evidence.read(arguments.out, facts.code())
    try:
        roofline.draw(rows, arguments.out / "roofline.png")
    except Absent as absent:
        print(f"roofline.png: not drawn, {absent}")
    for line in evidence.wrong(rows):
        print(line)
    if tiles := [row for row in rows if row["stage"] == "tune"]:
        device = timing.find_device(arguments.device, "--device")
        tune.conclude(tiles, device, arguments.out / tune.name(device))
    tables.print_table(evidence.STAGE_HEADINGS, evidence.stages(rows))
    if lines := evidence.targets(rows):
        tables.print_table(evidence.TARGET_HEADINGS, lines)


if __name__ == "__main__":
    main()
