"""Claims about watching a run: what it says while it grows, and when it stops."""

import json
import shutil
import sys
import types

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import watch
from moe.run import jsonl
from moe.run.lock import Lock
from tests.moe.train.test_progress import plain, terminal
from tests.small_runs import STEPS, files, settings, train, train_until


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.watch`."""

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["watch.py", *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            watch.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def pausing(monkeypatch, sleep):
    """Call `sleep` between two looks, and wait for nothing."""
    monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=sleep))


@pytest.fixture
def trained(corpus, tmp_path, capsys):
    """The folder of a finished run."""
    train(settings(corpus, tmp_path / "run"))
    capsys.readouterr()
    return tmp_path / "run"


@pytest.fixture
def growing(trained, monkeypatch):
    """The folder of a run that goes on while it is watched: between two looks a line more, then its end."""
    metrics, summary = trained / "metrics.jsonl", trained / "summary.json"
    lines, end = metrics.read_text().splitlines(keepends=True), summary.read_text()
    metrics.write_text(lines.pop(0))
    summary.unlink()
    lock = Lock(trained)
    lock.__enter__()

    def sleep(seconds):
        if lines:
            with metrics.open("a") as file:
                file.write(lines.pop(0))
        else:
            summary.write_text(end)
            lock.__exit__(None, None, None)

    pausing(monkeypatch, sleep)
    yield trained
    lock.ended.set()


def test_one_look_at_a_finished_run_says_it_all_and_writes_nothing(command, trained):
    before = files(trained)
    code, out, err = command(f"run={trained}", "once=true")
    assert (code, err) == (0, "")
    assert files(trained) == before
    last = jsonl.read_lines(trained / "metrics.jsonl")[-1]
    lines = out.splitlines()
    assert lines[0] == f"run: finished, {STEPS} steps"
    assert f"{last['lm_loss']:.4f}  val {last['val']['loss']:.4f} at step {STEPS}" in lines[2]
    counts = jsonl.read_lines(trained / "routing" / "counts.jsonl")[-1]
    for i, layer in enumerate(last["layers"]):
        fields = lines[4 + i].split()
        assert fields[:2] == [str(i), f"{layer['max_vio']:.2f}"]
        fair = sum(counts["counts"][i]) / 4
        expected = [f"{count / fair:.1f}" if count else "dead" for count in counts["counts"][i]]
        assert fields[-4:] == expected


def test_in_a_pipe_every_line_comes_once_until_the_run_ends(command, growing):
    code, out, err = command(f"run={growing}", "seconds=0.1")
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[:-1]] == ["0/7", "2/7", "4/7", "6/7", "7/7"]
    assert out.splitlines()[-1] == f"run: finished, {STEPS} steps"
    assert "\x1b" not in out


def test_on_a_terminal_the_view_follows_the_run_and_its_last_stays(growing, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["watch.py", f"run={growing}"])
    GlobalHydra.instance().clear()
    with terminal() as out:
        watch.main()
    shown = plain(out.getvalue())
    places = [shown.index(f"run: step {step} of 7") for step in range(1, 8)]
    assert places == sorted(places)
    assert shown.index("run: no step is recorded yet") < places[0]
    assert "MaxVio" in shown[shown.index("run: finished, 7 steps") :]


def test_ctrl_c_leaves_the_run_alone(command, growing, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    pausing(monkeypatch, interrupt)
    before = files(growing)
    code, _, err = command(f"run={growing}")
    assert (code, err) == (0, "")
    assert files(growing) == before


def test_a_reader_who_leaves_ends_it(growing, monkeypatch):
    looks = iter(range(3))
    pausing(monkeypatch, lambda seconds: next(looks))
    monkeypatch.setattr(watch.terminal, "lost", lambda: OSError(32, "Broken pipe"))
    watch.in_pipe(watch.Watched(growing), 0.1, None)
    assert next(looks) == 0


def test_a_run_that_nobody_trains_ends_it_unless_somebody_goes_on(command, corpus, tmp_path, monkeypatch, capsys):
    cfg = settings(corpus, tmp_path / "run")
    train_until(cfg, 5)
    for path in (tmp_path / "run").glob("lock-*"):
        path.unlink()
    capsys.readouterr()
    pauses = []
    pausing(monkeypatch, pauses.append)
    code, out, err = command(f"run={tmp_path / 'run'}", "seconds=0.5")
    assert (code, err) == (0, "")
    assert out.endswith("run: interrupted, step 4 of 7 is recorded, and nobody trains it\n")
    assert pauses == [0.5]

    # Between two looks it is gone on with: a checkpoint back, its lines written anew, and to the end.
    cfg.resume = True
    watched = watch.Watched(tmp_path / "run")
    watched.look()
    assert (watched.seen.last.step, watched.ended) == (4, False)
    train(cfg)
    assert [line.step for line in watched.look()] == list(range(STEPS + 1))
    assert (len(watched.seen.losses), watched.ended) == (STEPS, True)


def test_a_dense_run_and_one_that_has_not_begun_are_told(command, corpus, tmp_path, capsys):
    train(settings(corpus, tmp_path / "dense", {"model.moe": None}))
    shutil.copytree(tmp_path / "dense", tmp_path / "new")
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "new" / name).unlink()
    capsys.readouterr()
    assert "a dense model: there is no router to watch\n" in command(f"run={tmp_path / 'dense'}", "once=true")[1]
    code, out, err = command(f"run={tmp_path / 'new'}", "once=true")
    assert (code, err) == (0, "")
    assert out.startswith("new: no step is recorded yet, and nobody trains it\n")


def test_what_cannot_be_watched_is_one_sentence(command, trained, tmp_path):
    (trained / "routing" / "counts.jsonl").write_text(json.dumps({"step": 2, "counts": [["many"]]}) + "\n")
    for arguments, words in (
        ((), "run= is needed: the folder of a run, like run=runs/demo/moe-seed0."),
        ((f"run={tmp_path}",), f"run={tmp_path} is not a run's folder: it has no config.yaml; there are {trained}."),
        ((f"run={trained}", "seconds=0"), "seconds=0.0 is out of range: accepted is "),
        ((f"run={trained}", "once=true"), f"{trained}/routing/counts.jsonl, line 1: counts[0][0] is damaged: 'many'"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {words}")
        assert err.count("\n") == 1
    (trained / "metrics.jsonl").write_text("{\n")
    assert "metrics.jsonl, line 1 is damaged" in command(f"run={trained}", "once=true")[2]
