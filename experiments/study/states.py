"""How far every job of a study is, told from the files alone: works while others train, and where nothing can be
written."""

from dataclasses import dataclass
from pathlib import Path

from experiments.study.claims import claim_of, failures
from experiments.study.manifest import Job, Study, config_of, finished, run_of, runs_of
from moe.errors import BadInput
from moe.run import jsonl
from moe.run.lock import holding
from moe.run.summary import MetricsLine, Summary, line_from_json

WORDS = ("done", "running", "failed", "interrupted", "waiting")


@dataclass(frozen=True)
class State:
    """How far a job is."""

    word: str  # done | running | failed | interrupted | waiting
    step: int = 0  # the last one that its metrics tell of
    of: int = 0  # steps there will be
    seconds_left: float | None = None  # of training, at the pace so far; None where that is not known
    error: str = ""  # of a failed one the last line of the error, of any other what cannot be read
    tries: int = 0  # that failed
    holder: str = ""  # the process that is at it
    summary: Summary | None = None  # of one that is done


def state_of(folder: Path, job: Job) -> State:
    """The state of a job of the study in `folder`."""
    runs, run, cfg = runs_of(folder), run_of(folder, job), config_of(job)
    failed, damage = failures(runs, job.id), ""

    # Finished, and by these settings.
    try:
        if summary := finished(run, cfg):
            return State("done", summary.steps, cfg.train.steps, 0.0, tries=len(failed), summary=summary)
    except BadInput as bad:
        damage = str(bad)

    # Somebody's, or nobody's.
    holder, line = "", None
    try:
        holder = holding(claim_of(runs, job.id)) or holding(run)
        line = last_line(run)
    except BadInput as bad:
        damage = damage or str(bad)
    word = "running" if holder else "interrupted" if (run / "config.yaml").exists() else "waiting"
    if not holder and (failed or (damage and (run / "summary.json").exists())):
        word = "failed"
    step = line.step if line else 0
    error = damage or (failed[-1].last if failed and not holder else "")
    return State(word, step, cfg.train.steps, seconds_left(line, cfg.train.steps), error, len(failed), holder)


def states_of(folder: Path, study: Study) -> list[State]:
    """The state of every job, in the order of the plan."""
    return [state_of(folder, job) for job in study.jobs]


def last_line(run: Path) -> MetricsLine | None:
    """The last whole line of a run's metrics.jsonl; None before there is one. Raises `BadInput` for a damaged file."""
    path = run / "metrics.jsonl"
    lines = jsonl.read_lines(path)
    return line_from_json(lines[-1], str(path)) if lines else None


def seconds_left(line: MetricsLine | None, steps: int) -> float | None:
    """Seconds of training to come, at the pace so far; None where no step has taken time that a clock saw."""
    if line is None or line.step <= 0 or not line.seconds > 0:
        return None
    return max(0, steps - line.step) * line.seconds / line.step


def counted(states: list[State]) -> str:
    """How many jobs are in which state: `3 done, 1 running, 8 waiting`."""
    count = {word: sum(state.word == word for state in states) for word in WORDS}
    return ", ".join(f"{n} {word}" for word, n in count.items() if n) or "no job"
