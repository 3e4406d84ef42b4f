"""Claims about the workers of one machine: the cores are shared out, and no kill changes a study's result."""

import os
import random
import signal
import threading

import pytest

from experiments.study import pool
from experiments.study.claims import failures, record_failure
from experiments.study.manifest import run_of
from experiments.study.pool import Pool, conclude, gpus, shares
from experiments.study.states import states_of
from moe.errors import BadInput
from moe.run import jsonl
from tests.experiments.study import forked
from tests.experiments.study.small_studies import fates, job, study_of, work, write
from tests.small_runs import Killed

STEPS = 10


@pytest.fixture
def quick_starts(monkeypatch):
    """Workers that need no imports of their own; that an interpreter does the same, others of these tests hold."""
    monkeypatch.setattr(pool, "subprocess", forked)


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "threads", "visible"),
    [
        (2, 8, [], ["4", "4"], [None, None]),
        (3, 8, [], ["2", "2", "2"], [None] * 3),
        (4, 2, [], ["1"] * 4, [None] * 4),
        (3, 6, ["0", "2"], ["2"] * 3, ["0", "2", "0"]),
    ],
)
def test_cores_and_gpus_are_shared_out(workers, cores, gpus, threads, visible):
    environments = shares(workers, cores, gpus)
    assert [share["OMP_NUM_THREADS"] for share in environments] == threads
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in environments] == visible


def test_gpus_are_shared_out_unless_a_job_names_its_own(corpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus(study_of([job(corpus, train__device="auto")])) == ["3", "5"]
    assert gpus(study_of([job(corpus, train__device="cuda:1")])) == []
    assert gpus(study_of([job(corpus, train__device="cpu")])) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus(study_of([job(corpus, train__device="auto")])) == ["0", "1"]


class Hunted(Pool):
    """A pool of which a worker is killed whenever the runs have taken some more steps, and at last the whole."""

    def __init__(self, *given, moments):
        super().__init__(*given)
        self.moments, self.killed = moments, []

    def hear(self):
        super().hear()
        taken = sum(len(jsonl.read_lines(run_of(self.folder, each) / "metrics.jsonl")) for each in self.study.jobs)
        if self.moments and taken >= self.moments[0]:
            self.moments.pop(0)
            if not self.moments:
                raise Killed
            busy = [number for number, worker in self.workers.items() if worker.job and worker.process.poll() is None]
            if busy:
                os.kill(self.workers[busy[-1]].process.pid, signal.SIGKILL)
                self.killed.append(busy[-1])


def test_twelve_runs_killed_at_five_moments_end_bitwise_as_if_left_alone(tmp_path, corpus, quick_starts, monkeypatch):
    """Two workers; one is killed four times in the middle of a run, then both, and the command with them."""
    monkeypatch.setattr(pool, "TICK", 0.05)
    jobs = [
        job(corpus, arm, seed, train__steps=STEPS, checkpoint__every=3)
        for arm in ("softmax", "sigmoid", "top-p") for seed in range(4)
    ]  # fmt: skip
    alone = write(tmp_path / "alone" / "study", jobs)
    work(tmp_path / "alone" / "study")
    folder = tmp_path / "killed" / "study"
    study = write(folder, jobs, retries=9)
    said = []
    moments = sorted(random.Random(0).sample(range(10, 10 * STEPS), 5))
    hunted = Hunted(folder, study, 2, said.append, moments=moments)
    with pytest.raises(Killed):
        hunted.run()
    assert len(hunted.killed) == 4
    assert any(state.word != "done" for state in states_of(folder, study))
    assert Pool(folder, study, 2, said.append).run() == 0
    assert fates(folder, study) == fates(tmp_path / "alone" / "study", alone)
    assert sum("was killed by signal 9; another takes its place" in line for line in said) == 4
    assert said[-1] == f"study: {folder} is finished: all 12 jobs are done"


def test_two_studies_at_work_at_a_time_train_what_they_share_once_and_both_end(tmp_path, corpus, quick_starts):
    shared = [job(corpus, seed=seed) for seed in range(3)]
    plans = {"one": [*shared, job(corpus, "sigmoid")], "other": [*reversed(shared), job(corpus, "sigmoid", 1)]}
    studies = {name: write(tmp_path / name, jobs) for name, jobs in plans.items()}
    said: dict[str, list[str]] = {name: [] for name in plans}
    ends = {}

    def run(name):
        ends[name] = Pool(tmp_path / name, studies[name], 1, said[name].append).run()

    threads = [threading.Thread(target=run, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {"one": 0, "other": 0}
    trained = [line.partition(":")[0] for lines in said.values() for line in lines if "val loss" in line]
    assert sorted(trained) == ["sigmoid seed 0", "sigmoid seed 1", *(f"softmax seed {seed}" for seed in range(3))]
    for name, study in studies.items():
        write(tmp_path / "alone" / name, study.jobs)
        work(tmp_path / "alone" / name)
        assert fates(tmp_path / name, study) == fates(tmp_path / "alone" / name, study)


def test_a_study_with_a_job_that_fails_ends_with_status_2_and_says_which(tmp_path, corpus, quick_starts, capsys):
    bad, good = job(corpus, data__path=str(tmp_path / "nowhere")), job(corpus, seed=1)
    study = write(tmp_path / "study", [bad, good], retries=1)
    said = []
    assert Pool(tmp_path / "study", study, 1, said.append).run() == 2
    assert [state.word for state in states_of(tmp_path / "study", study)] == ["failed", "done"]
    assert sum(line.startswith("softmax seed 0: failed (") for line in said) == 2
    assert any(line.startswith("softmax seed 1: val loss ") and "(1 done, 1 " in line for line in said)
    refusal = capsys.readouterr().err.splitlines()
    assert refusal[0].startswith("error: 1 of 2 jobs failed; try them again with python -m experiments.sweep run=")
    assert refusal[0].endswith(" again=true")
    assert refusal[1].startswith(f"  softmax seed 0 ({bad.id}): data.path={tmp_path}/nowhere")


def test_a_job_whose_workers_die_without_getting_further_counts_as_failed(tmp_path, corpus):
    """As where memory is short: else it would be begun again for ever."""
    planned = job(corpus)
    study = write(tmp_path / "study", [planned])
    watched = Pool(tmp_path / "study", study, 1, lambda line: None)
    metrics = jsonl.Lines(run_of(tmp_path / "study", planned) / "metrics.jsonl")
    metrics.write({"step": 1, "seconds": 1.0})
    watched.count_death(planned, "was killed by signal 9")
    assert failures(tmp_path, planned.id) == []
    metrics.write({"step": 2, "seconds": 1.0})
    watched.count_death(planned, "was killed by signal 9")
    assert failures(tmp_path, planned.id) == []
    watched.count_death(planned, "was killed by signal 9")
    assert [failure.last for failure in failures(tmp_path, planned.id)] == [
        "its process was killed by signal 9 at step 2, and the one before it no later: memory may be short."
    ]
    metrics.close()


def test_a_signal_has_the_workers_save_and_says_how_to_go_on(tmp_path, corpus, monkeypatch):
    planned = job(corpus, train__steps=100_000, checkpoint__every=0)
    study = write(tmp_path / "study", [planned])
    said = []

    class Stopped(Pool):
        def note(self, number, event):
            super().note(number, event)
            signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    assert Stopped(tmp_path / "study", study, 1, said.append).run() == 128 + signal.SIGINT
    assert said[-1].startswith("Go on with: python -m experiments.sweep run=")
    assert failures(tmp_path, planned.id) == []
    (state,) = states_of(tmp_path / "study", study)
    assert state.word in ("interrupted", "waiting")
    assert state.holder == ""


def test_workers_that_cannot_work_end_the_pool(tmp_path, corpus, capfd):
    """Their own sentence says why, and none is started in their place."""
    study = study_of([job(corpus)])  # whose plan was never written
    said = []
    assert Pool(tmp_path, study, 1, said.append).run() == 2
    assert capfd.readouterr().err.count("is not a study's folder: it has no study.json") == 1
    assert said[1:2] == [f"study: {tmp_path}  1 waiting"]


def test_what_failed_for_good_before_is_said_again(tmp_path, corpus, capsys):
    planned = job(corpus)
    study = write(tmp_path / "study", [planned], retries=0)
    record_failure(tmp_path, planned.id, BadInput("there is too little memory."))
    assert conclude(tmp_path / "study", study) == 2
    assert "there is too little memory." in capsys.readouterr().err
