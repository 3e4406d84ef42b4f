"""Workers of one machine: processes that share out its cores and GPUs, watched by the command that started them.

A worker that dies takes nothing with it: another is started, and goes on from the job's last checkpoint. A job whose
worker dies again and again without getting any further counts as failed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from experiments.study.claims import record_failure
from experiments.study.manifest import Job, Study, read_study, run_of, runs_of, write_study
from experiments.study.search import best, is_wanting, refusals
from experiments.study.states import State, counted, last_line, state_of, states_of
from experiments.study.worker import REFUSED, Event
from moe.errors import BadInput
from moe.run import jsonl, machine, terminal
from moe.run.command_line import command_line, override
from moe.train.signals import catch_signals

TICK = 0.2  # seconds between two looks at the workers
IDLE_DEATHS = 10  # of workers that were at no job, after which none is started any more


def shares(workers: int, cores: int, gpus: list[str]) -> list[dict[str, str]]:
    """The environment of every worker: its threads, and its GPU where there are some."""
    threads = str(max(1, cores // workers))
    each_core = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return [each_core | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(workers)]


def cores() -> int:
    """The cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def gpus(study: Study) -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none where a job names its own."""
    if any(":" in tree["train"]["device"] or tree["train"]["device"] == "cpu" for tree in study.settings):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def this_code() -> dict[str, str]:
    """The environment in which another process finds the code that this one has, wherever it runs."""
    path = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


class Worker:
    """A process that works on the study in `folder`; what it tells goes to `events` with its number."""

    def __init__(self, number: int, folder: Path, share: dict[str, str], events: "queue.Queue[tuple[int, Event]]"):
        self.number, self.share, self.job = number, share, ""
        # A session of its own: Ctrl-C reaches it once, from here.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.study.worker", str(folder), "--tied"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | share | this_code(),
            start_new_session=True,
        )
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()

    def _listen(self, events: "queue.Queue[tuple[int, Event]]") -> None:
        assert self.process.stdout
        for raw in self.process.stdout:
            with contextlib.suppress(ValueError, BadInput):  # whatever else a library prints
                events.put((self.number, jsonl.record(Event, json.loads(raw), "an event")))

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Pool:
    """The workers of one machine, at one study."""

    def __init__(self, folder: Path, study: Study, workers: int, say: Callable[[str], None] = terminal.say) -> None:
        self.folder, self.study, self.say = folder, study, say
        self.jobs: dict[str, Job] = {job.id: job for job in study.jobs}
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self.shares = shares(workers, cores(), gpus(study))
        self.workers: dict[int, Worker] = {}
        self.died_at: dict[str, int] = {}  # the step that a job was at as its worker died
        self.done: dict[str, State] = {}
        self.idle_deaths = 0
        self.broken = 0  # the exit status of a worker that could not go on

    def run(self) -> int:
        """Work until every job is done or has failed for good, or a signal asks for an end. Returns the exit status: 0,
        2 where jobs failed, 128 + the signal's number."""
        begun = self.states()
        threads = self.shares[0]["OMP_NUM_THREADS"]
        many = f"{len(self.shares)} workers" if len(self.shares) > 1 else "1 worker"
        self.say(f"study: {self.folder}  {len(begun)} jobs: {counted(begun)}  {many} of {threads} threads")
        if self.study.search:
            self.say(best(self.folder, self.study))
        try:
            with catch_signals() as stop:
                for i, share in enumerate(self.shares):
                    self.workers[i] = Worker(i, self.folder, share, self.events)
                asked = 0
                while self.workers:
                    self.hear()
                    self.bury(bool(stop.number))
                    if stop.number and not asked:
                        asked = stop.number
                        self.say("study: stopping; every worker saves its run first")
                        for worker in self.workers.values():
                            worker.send(signal.SIGTERM)
        finally:
            for worker in self.workers.values():
                worker.send(signal.SIGKILL)
                worker.process.wait()
        return conclude(self.folder, self.study, self.say, stop.number, self.broken)

    def states(self) -> list[State]:
        """The states of all jobs; what is done is not read again."""
        self.refresh()
        states = [self.done.get(job.id) or state_of(self.folder, job) for job in self.study.jobs]
        self.done = {job.id: state for job, state in zip(self.study.jobs, states, strict=True) if state.word == "done"}
        return states

    def refresh(self) -> None:
        """Read a plan that grows again."""
        if self.study.search:
            self.study = read_study(self.folder)
            self.jobs = {job.id: job for job in self.study.jobs}

    def hear(self) -> None:
        """Print what the workers have told, after at most a moment's wait."""
        with contextlib.suppress(queue.Empty):
            number, event = self.events.get(timeout=TICK)
            while True:
                self.note(number, event)
                number, event = self.events.get_nowait()

    def note(self, number: int, event: Event) -> None:
        """Print a line for a job that has ended."""
        if event.job not in self.jobs:
            self.refresh()
        job = self.jobs[event.job]
        if number in self.workers:
            self.workers[number].job = event.job if event.what == "begun" else ""
        match event.what:
            case "done":
                self.say(f"{job.title}: val loss {event.loss:.4f} in {event.seconds:.0f} s  ({counted(self.states())})")
            case "failed":
                left = self.study.retries + 1 - event.tries
                what_next = f"tried {left} more time{'s' * (left > 1)}" if left > 0 else "not tried again"
                self.say(f"{job.title}: failed ({what_next}): {event.error}")

    def bury(self, stopping: bool) -> None:
        """Take workers that have ended off the list, and start another for one that died at a job."""
        for number, worker in list(self.workers.items()):
            if worker.process.poll() is None:
                continue
            worker.listener.join()
            while not self.events.empty():
                self.note(*self.events.get_nowait())
            status, job = worker.process.returncode, self.jobs.get(worker.job)
            del self.workers[number]
            if stopping or status == 0:
                continue
            # One that refused, or fell while it had no job, would only do so again; a kill may hit any.
            self.idle_deaths += job is None
            if status == REFUSED or (job is None and (status > 0 or self.idle_deaths > IDLE_DEATHS)):
                self.broken = self.broken or status
                continue
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self.say(f"{job.title if job else f'worker {number}'}: the process {how}; another takes its place")
            if job:
                self.count_death(job, how)
            self.workers[number] = Worker(number, self.folder, worker.share, self.events)

    def count_death(self, job: Job, how: str) -> None:
        """Record a failure of a job whose workers die without getting any further, as where memory is short."""
        try:
            line = last_line(run_of(self.folder, job))
        except BadInput:
            line = None
        step = line.step if line else 0
        if step <= self.died_at.get(job.id, -1):
            why = f"its process {how} at step {step}, and the one before it no later: memory may be short."
            record_failure(runs_of(self.folder), job.id, BadInput(why))
        self.died_at[job.id] = max(step, self.died_at.get(job.id, -1))


def train_missing(folder: Path, name: str, command: str, jobs: list[Job], workers: int, margin: float = 0.0) -> int:
    """Work through runs of which only their lines in a results file will be kept, as the study in `folder`. `command`:
    what to type to go on. Returns its exit status."""
    study = Study(name, command, machine.git_state().commit, jobs[0].arm, margin, jobs)
    write_study(folder, study)
    return Pool(folder, study, workers).run()


def conclude(
    folder: Path, study: Study, say: Callable[[str], None] = terminal.say, signalled: int = 0, broken: int = 0
) -> int:
    """Say how a study stands when its workers have ended, by a signal or because they were `broken`. Returns the exit
    status."""
    study = read_study(folder) if study.search else study
    states = states_of(folder, study)
    failed = [(job, state) for job, state in zip(study.jobs, states, strict=True) if state.word == "failed"]
    open_jobs = [state for state in states if state.word not in ("done", "failed")]
    again = command_line("sweep", override("run", str(folder)))
    if study.search:
        for line in [*refusals(study), best(folder, study)]:
            say(line)
    if study.search and not study.jobs and not is_wanting(study):
        print("error: no trial of the search could be trained: each was refused above", file=sys.stderr)
        return REFUSED
    if not failed and not open_jobs and not is_wanting(study):
        say(f"study: {folder} is finished: all {len(states)} jobs are done")
        return 0
    say(f"study: {folder}  {counted(states)}")
    if open_jobs or is_wanting(study):
        say(f"Go on with: {again}")
    if failed:
        print_failed(failed, len(states), f"{again} again=true")
    return 128 + signalled if signalled else (broken if broken > 0 else REFUSED)


def print_failed(failed: list[tuple[Job, State]], n_jobs: int, again: str) -> None:
    """Name the jobs that failed on standard error, each with its reason, and how to try them again."""
    sys.stdout.flush()
    print(f"error: {len(failed)} of {n_jobs} jobs failed; try them again with {again}", file=sys.stderr)
    for job, state in failed:
        print(f"  {terminal.printable(f'{job.title} ({job.id}): {state.error}')}", file=sys.stderr)
