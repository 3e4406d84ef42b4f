"""Claims about the command that works through a study."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import experiments.train
from experiments import sweep
from experiments.refusals import CONF
from experiments.study.claims import claim_of, failures, record_failure
from experiments.study.manifest import read_study, run_of
from moe.config.run import Config
from moe.errors import BadInput
from moe.run.summary import read_summary
from tests.experiments.study import small_studies
from tests.experiments.train_command import words
from tests.small_runs import fate


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.sweep`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "Pool", small_studies.InThisProcess)

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
        GlobalHydra.instance().clear()
        status = 0
        try:
            sweep.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def small(corpus, run="runs/study", **changes):
    """The words of a study of small runs."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return words(corpus, run, {"train.steps": 2, "train.eval_every": 0} | dotted)


def test_a_study_is_planned_trained_and_found_again(command, corpus, tmp_path):
    given = [*small(corpus), "router=softmax,sigmoid", "seed=0,1"]
    status, _, err = command(*given)
    assert (status, err) == (0, "")
    study = read_study(tmp_path / "runs" / "study")
    assert [(job.arm, job.seed) for job in study.jobs] == [
        (arm, seed) for arm in ("softmax", "sigmoid") for seed in (0, 1)
    ]
    assert study.command.startswith("python -m experiments.sweep ")
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"study", ".claims", *(job.id for job in study.jobs)}
    before = small_studies.fates(tmp_path / "runs" / "study", study)
    for again in (given, ["run=runs/study"]):  # repeated, or by its folder alone
        assert command(*again)[0] == 0
        assert small_studies.fates(tmp_path / "runs" / "study", study) == before
    assert read_study(tmp_path / "runs" / "study") == study


def test_a_job_is_the_run_that_the_training_command_makes(command, corpus, tmp_path, monkeypatch):
    command(*small(corpus), "seed=4,5")
    job = read_study(tmp_path / "runs" / "study").jobs[1]
    monkeypatch.setattr(sys, "argv", ["train.py", *small(corpus, tmp_path / "alone"), "seed=5"])
    GlobalHydra.instance().clear()
    experiments.train.main()
    assert fate(run_of(tmp_path / "runs" / "study", job)) == fate(tmp_path / "alone")


def test_another_plan_is_refused_and_what_is_free_may_change(command, corpus, tmp_path):
    command(*small(corpus), "seed=0,1")
    status, _, err = command(*small(corpus), "seed=0,1,2")
    assert status == 2
    assert "run=runs/study has another plan than this command makes: 1 job more (run seed 2); go on with its" in err
    status, _, err = command(*small(corpus), "seed=0,1", "study.margin=0.5")
    assert (status, "study.margin=0.5 where it was 0.01" in err) == (2, True)
    status, _, err = command(*small(corpus, optim__lr=0.5), "seed=0,1")
    assert (status, "optim.lr=0.5 where it was 0.002 (in run seed 0, run seed 1)" in err) == (2, True)
    status, _, err = command(*small(corpus, log__every=1), "seed=0,1", "study.retries=4")
    assert (status, err) == (0, "")
    assert read_study(tmp_path / "runs" / "study").retries == 4


def test_the_precision_is_measured_once_and_kept(command, corpus, tmp_path, monkeypatch):
    measured = []

    def measure(cfg, device):
        measured.append(cfg.model.vocab_size)
        return ("bf16", "fp32")[len(measured) - 1], "it was quicker"

    monkeypatch.setattr(sweep, "choose_precision", measure)
    given = [*small(corpus, train__precision="auto"), "seed=0,1"]
    status, out, err = command(*given)
    assert (status, err) == (0, "")
    assert "precision: bf16 for the whole study, because it was quicker" in out
    assert command(*given)[0] == 0
    assert measured == [257]
    study = read_study(tmp_path / "runs" / "study")
    assert {job.config["train"]["precision"] for job in study.jobs} == {"bf16"}
    assert {read_summary(run_of(tmp_path / "runs" / "study", job)).precision for job in study.jobs} == {"bf16"}


def test_a_study_beside_another_takes_its_precision_and_trains_only_what_is_new(command, corpus, tmp_path, monkeypatch):
    """Else a measurement that comes out otherwise would have every run trained again."""
    measured = iter(["bf16", "fp32"])
    monkeypatch.setattr(sweep, "choose_precision", lambda cfg, device: (next(measured), "it was quicker"))
    small_auto = lambda run: small(corpus, run, train__precision="auto")
    assert command(*small_auto("runs/two"), "seed=0,1")[0] == 0
    status, out, _ = command(*small_auto("runs/three"), "seed=0,1,2")
    assert status == 0
    assert "precision: bf16 for the whole study, as in 2 of its runs that are there" in out
    ids = [{job.id for job in read_study(tmp_path / "runs" / name).jobs} for name in ("two", "three")]
    assert ids[0] < ids[1]
    assert command(*small_auto("elsewhere/two"), "seed=0,1")[0] == 0
    assert next(measured, None) is None


def test_a_search_is_asked_for_trained_and_gone_on_with_for_more_trials(command, corpus, tmp_path):
    folder = tmp_path / "runs" / "study"
    given = [*small(corpus), "study.search={optim.lr: log 1e-3 3e-2}", "study.trials=2"]
    assert command(*given)[::2] == (0, "")
    two = read_study(folder)
    assert [job.arm for job in two.jobs] == ["trial-0", "trial-1"]
    assert command(*given)[::2] == (0, "")
    assert read_study(folder) == two
    assert command(*given, "study.trials=3")[::2] == (0, "")
    three = read_study(folder)
    assert (three.jobs[:2], [job.arm for job in three.jobs[2:]]) == (two.jobs, ["trial-2"])
    assert command("run=runs/study")[::2] == (0, "")
    status, _, err = command(*given, "study.search={optim.lr: log 1e-3 1e-2}", "train.steps=3")
    assert status == 2
    assert (
        "another plan than this command makes: train.steps=3 where it was 2 (in every trial seed 0), study.sear" in err
    )
    assert read_study(folder) == three
    (tmp_path / "runs" / three.jobs[1].id / "summary.json").unlink()
    assert command("run=runs/study")[::2] == (0, "")
    assert (tmp_path / "runs" / three.jobs[1].id / "summary.json").exists()


def test_what_failed_for_good_is_tried_again_when_asked(command, corpus, tmp_path):
    given = [*small(corpus), "seed=0,1", "study.retries=0"]
    command(*given)
    study = read_study(tmp_path / "runs" / "study")
    job = study.jobs[0]
    record_failure(tmp_path / "runs", job.id, BadInput("too little memory."))
    (run_of(tmp_path / "runs" / "study", job) / "summary.json").unlink()
    assert command(*given)[0] == 0
    assert not (tmp_path / "runs" / job.id / "summary.json").exists()
    assert command("run=runs/study", "again=true")[0] == 0
    assert (tmp_path / "runs" / job.id / "summary.json").exists()
    assert failures(tmp_path / "runs", job.id) == []
    assert (claim_of(tmp_path / "runs", job.id) / "failed-before").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=runs/nothing"], "run=runs/nothing is not a study's folder: it has no study.json."),
        (["-m", "seed=0,1"], "a study is no multirun: give the settings alone"),
        (["seed=0,1"], "run= is needed for a study that is no file of conf/experiment"),
        (["run=runs/a", "optim.rl=1,2"], "optim.rl is not a setting; did you mean optim.lr."),
        (["run=runs/a"] * 2 + ["workers=x"], "workers=x must be a whole number."),
        (["experiment=first-stud", "run=a"], "experiment=first-stud does not exist; did you mean first-study."),
        (["run=runs/a", "data=text", "data.path=nowhere", "seed=0,1"], "data.path=nowhere"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_no_study(arguments, sentence, command, tmp_path):
    status, _, err = command(*arguments)
    assert status == 2
    assert err.startswith(f"error: {sentence}"), err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("study.json")) == []


def test_a_runs_folder_is_no_place_for_a_study(command, corpus, tmp_path):
    run = tmp_path / "runs" / "study"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    status, _, err = command(*small(corpus), "seed=0,1")
    assert (status, "run=runs/study is a run's folder: choose another" in err) == (2, True)


def test_a_plan_with_a_router_of_ones_own_is_trusted_only_when_asked(command, corpus, tmp_path):
    config = small_studies.job(corpus)
    tree = json.loads(json.dumps(config.config)) | {"router": config.config["router"] | {"name": "mine:Nearest"}}
    small_studies.write(tmp_path / "study", [type(config)("0" * 12, "mine", 0, [], tree)])
    status, _, err = command(f"run={tmp_path / 'study'}")
    assert status == 2
    assert "mine:Nearest" in err
    assert "trust=true" in err


def test_help_lists_the_settings_of_the_study(command):
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    assert "study.margin=0.01" in out
    assert "workers=1" in out


def test_the_training_command_says_who_works_through_a_study(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in (["-m", "experiment=first-study"], ["experiment=first-study"]):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            experiments.train.main()
        refusal = capsys.readouterr().err
        assert refusal.startswith(
            "error: this experiment is a study, with runs of its own: work through it with python -m "
            "experiments.sweep experiment=NAME run=runs/NAME"
        )
        assert refusal.count("\n") == 1


def test_ctrl_c_saves_and_the_same_command_goes_on(command, corpus, tmp_path):
    """The command itself, with a worker of its own."""
    given = [*small(corpus, train__steps=30, checkpoint__every=0), "seed=0,1,2"]
    line = [sys.executable, "-m", "experiments.sweep", *given]
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    while "val loss" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) in ((130, ""), (0, ""))  # 0: the last run was done at that moment
    if process.returncode:
        assert out.splitlines()[-1] == "Go on with: python -m experiments.sweep run=runs/study"
    assert command(*given)[::2] == (0, "")
    study = read_study(tmp_path / "runs" / "study")
    small_studies.write(tmp_path / "alone" / "study", study.jobs)
    small_studies.work(tmp_path / "alone" / "study")
    assert small_studies.fates(Path(tmp_path, "runs", "study"), study) == small_studies.fates(
        tmp_path / "alone" / "study", study
    )


def test_the_settings_of_a_run_are_those_of_the_training_command():
    assert set(Config.__dataclass_fields__) < set(sweep.SweepConfig.__dataclass_fields__)
