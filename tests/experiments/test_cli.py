"""Claims about the command line: it composes what was asked for, and sweeps over it."""

import multiprocessing
import os
import pickle
import subprocess
import sys

import hydra
import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import cli
from experiments.compare import CompareConfig
from moe.config.run import Config
from moe.errors import BadInput


def test_an_option_with_a_value_is_not_taken_for_a_setting(command):
    status, out, err, configs = command("--cfg", "job", "seed=7")
    assert (status, err, configs) == (0, "", [])
    assert out.startswith("seed: 7\n")


def test_options_may_stand_anywhere(command):
    status, _, err, configs = command("optim.lr=0.5", "-m", "seed=0,1", "--multirun", "train.steps=9")
    assert (status, err) == (0, "")
    assert [(cfg.seed, cfg.optim.lr, cfg.train.steps) for cfg in configs] == [(0, 0.5, 9), (1, 0.5, 9)]
    status, out, err, _ = command("seed=7", "--cfg", "job", "train.steps=9")
    assert (status, err) == (0, "")
    assert "seed: 7\n" in out
    assert "steps: 9\n" in out


def test_settings_and_groups_reach_training(command):
    status, _, err, (cfg,) = command("model=cpu-nano", "router=sigmoid-bias", "balance=bias", "seed=3", "optim.lr=1e-4")
    assert (status, err) == (0, "")
    assert (cfg.model.name, cfg.model.d_model, cfg.model.moe.n_experts) == ("cpu-nano", 64, 8)
    assert (cfg.router.name, cfg.router.selection_bias, cfg.balance.bias_rate) == ("sigmoid", True, 0.001)
    assert (cfg.seed, cfg.optim.lr) == (3, 1e-4)


def test_without_arguments_the_defaults_are_valid(command):
    status, _, _, (cfg,) = command()
    assert status == 0
    assert (cfg.data.name, cfg.model.name, cfg.tokenizer.name) == ("blend", "cpu-small", "bpe")


def test_a_dense_model_is_asked_for_with_null(command):
    _, _, _, (cfg,) = command("model.moe=null")
    assert cfg.model.moe is None


def test_a_multirun_trains_every_combination(command):
    status, _, err, configs = command("-m", "seed=0,1", "router=softmax,sigmoid", "run=runs/${router.name}-${seed}")
    assert (status, err) == (0, "")
    assert [(cfg.seed, cfg.router.name) for cfg in configs] == [
        (0, "softmax"), (0, "sigmoid"), (1, "softmax"), (1, "sigmoid"),
    ]  # fmt: skip
    assert [cfg.run for cfg in configs] == [f"runs/{cfg.router.name}-{cfg.seed}" for cfg in configs]


OWN = "router.name=moe.routing.token_choice:TopKRouter"


@pytest.mark.parametrize(
    "given", [["router.options.a=1", "router.options.b={c: [2,3]}"], ["router.options={a: 1, b: {c: [2,3]}}"]]
)
def test_what_a_router_of_ones_own_reads_is_given_by_itself_or_together(given, command):
    status, _, err, (cfg,) = command(OWN, *given)
    assert (status, err) == (0, "")
    assert cfg.router.options == {"a": 1, "b": {"c": [2, 3]}}
    cli.register("compare", CompareConfig)
    GlobalHydra.instance().clear()
    cli.check_overrides("compare", CompareConfig, [OWN, *given], False)
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        compared = cli.typed(cli.compose("compare", CompareConfig, [OWN, *given]), CompareConfig)
    assert compared.router.options == cfg.router.options


def test_a_value_of_ones_own_can_be_swept_over_and_laid_over_those_of_a_run(command):
    status, _, err, configs = command("-m", OWN, "router.options.a=1,2", "router.options.b=x")
    assert (status, err) == (0, "")
    assert [cfg.router.options for cfg in configs] == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    laid = cli.overlay(configs[0], configs[1], ["router.options.a", "balance.schedule"])
    assert laid.router.options == {"a": 2, "b": "x"}
    assert configs[0].router.options == {"a": 1, "b": "x"}


def test_a_coefficients_schedule_is_given_by_itself(command):
    *_, (cfg,) = command("balance.schedule.aux=[1,0]")
    assert cfg.balance.schedule == {"aux": [1.0, 0.0]}


def test_an_impossible_job_ends_a_sweep_before_its_first_one(command):
    status, _, err, configs = command("-m", "router=softmax,gshard", "model.moe.k=2,3", "seed=0,1", "run=runs/${seed}")
    assert (status, configs) == (2, [])
    assert err == (
        "error: router.second=random needs model.moe.k=2, and it is 3 "
        "(in the sweep's job router=gshard model.moe.k=3 seed=0).\n"
    )


def test_what_a_job_knows_of_itself_may_be_in_its_settings(command):
    status, _, err, configs = command("-m", "seed=0,1", "run=runs/${hydra:job.num}")
    assert (status, err) == (0, "")
    assert [cfg.run for cfg in configs] == ["runs/0", "runs/1"]


def test_a_sweep_over_all_choices_of_a_group(command):
    _, _, _, configs = command("-m", "router=glob(s*max*)")
    assert [cfg.router.renormalize for cfg in configs] == [True, False]


def test_a_list_is_no_sweep(command):
    _, _, _, (cfg,) = command("optim.betas=[0.8,0.9]")
    assert cfg.optim.betas == [0.8, 0.9]


@pytest.mark.parametrize(
    ("arguments", "called"),
    [(["-m", "seed=4,5"], [([4, 5], ["seed"])]), (["seed=4"], []), (["-m", "seed=4"], [([4], [])])],
)
def test_after_a_sweep_its_results_are_handed_over_in_order(monkeypatch, tmp_path, arguments, called):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    GlobalHydra.instance().clear()
    seen = []
    cli.command("train", Config, after=lambda *given: seen.append(given))(lambda cfg: cfg.seed)()
    assert seen == called


NO_MEMORY = "there is not enough memory: make the batch, the context or the model smaller, or close other programs."


@pytest.mark.parametrize(
    ("error", "why", "traceback"),
    [
        (BadInput("it is not so."), "it is not so.", False),
        (MemoryError(), NO_MEMORY, False),
        (ZeroDivisionError("not so"), "ZeroDivisionError: not so.", True),
    ],
)
def test_a_job_that_fails_does_not_end_the_others_and_is_named_at_the_end(
    error, why, traceback, monkeypatch, tmp_path, capsys
):
    def main(cfg):
        if cfg.seed == 4:
            raise error
        return cfg.seed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "optim.lr=1e-3", "seed=3,4,5"])
    GlobalHydra.instance().clear()
    seen = []
    with pytest.raises(SystemExit, match="2"):
        cli.command("train", Config, after=lambda *given: seen.append(given))(main)()
    assert seen == [([3, 5], ["seed"])]
    printed = capsys.readouterr()
    assert ("Traceback" in printed.err) == traceback
    assert printed.err.endswith(f"error: 1 of 3 jobs failed:\n  job 2 of 3 (seed=4): {why}\n")
    assert printed.out.splitlines() == [f"job {i + 1} of 3: seed={3 + i}" for i in range(3)]


def test_jobs_that_a_launcher_ran_elsewhere_are_not_taken_for_done(monkeypatch, tmp_path, capsys):
    """Where it hands back nothing of what they returned, or failed of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=3,4"])
    monkeypatch.setattr(cli.hydra, "main", lambda **_: lambda job: lambda: None)
    GlobalHydra.instance().clear()
    cli.command("train", Config)(lambda cfg: None)()
    assert capsys.readouterr().err == ("note: a launcher does not say how 2 of 2 jobs ended: see the runs' folders.\n")


def launch_elsewhere(launch):
    """In place of a launcher's `launch`: the same in another process, of which only what it returns comes back."""

    def launched(*given, **named):
        here, there = multiprocessing.Pipe(duplex=False)
        if (pid := os.fork()) == 0:
            there.send_bytes(pickle.dumps(launch(*given, **named)))
            os._exit(0)
        there.close()
        returns = pickle.loads(here.recv_bytes())
        os.waitpid(pid, 0)
        return returns

    return launched


def test_a_job_that_fails_in_a_process_of_a_launcher_gives_status_2(monkeypatch, tmp_path, capfd):
    def main(cfg):
        if cfg.seed == 4:
            raise BadInput("it is not so.")
        return cfg.seed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=3,4,5"])
    monkeypatch.setattr(BasicLauncher, "launch", launch_elsewhere(BasicLauncher.launch))
    GlobalHydra.instance().clear()
    seen = []
    with pytest.raises(SystemExit, match="2"):
        cli.command("train", Config, after=lambda *given: seen.append(given))(main)()
    assert seen == [([3, 5], ["seed"])]
    assert capfd.readouterr().err.endswith("error: 1 of 3 jobs failed:\n  job 2 of 3 (seed=4): it is not so.\n")


def test_ctrl_c_ends_a_sweep(monkeypatch, tmp_path, capsys):
    def main(cfg):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=3,4"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="130"):
        cli.command("train", Config)(main)()
    assert capsys.readouterr().out == "job 1 of 2: seed=3\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed=0,1", "run=runs/same"], "job 1 (seed=0) and job 2 (seed=1) would both write to runs/same"),
        (["seed=3,3"], "job 1 (seed=3) and job 2 (seed=3) would both write to runs/cpu-small-softmax-blend-seed3-"),
        (["seed=0,1,2", "run=runs/${seed}"], "runs/1 exists, where job 2 (seed=1) would write: add resume=true"),
    ],
)
def test_jobs_without_a_place_of_their_own_are_refused_before_the_first(given, words, command, tmp_path):
    (tmp_path / "runs" / "1").mkdir(parents=True)
    status, out, err, configs = command("-m", *given)
    assert (status, out, configs) == (2, "", [])
    assert err.startswith(f"error: {words}"), err
    assert err.count("\n") == 1


def test_an_existing_folder_is_gone_on_with(command, tmp_path):
    (tmp_path / "runs" / "1").mkdir(parents=True)
    status, _, err, configs = command("-m", "seed=1,2", "run=runs/${seed}", "optim.lr=0.1", "resume=true")
    assert (status, configs) == (2, [])  # where there is none to go on with, no job begins
    assert err == "error: run=runs/1 is not a run's folder: it has no config.yaml (in the sweep's job seed=1).\n"
    (tmp_path / "runs" / "1" / "config.yaml").write_text("seed: 1\nmodel: {d_ff: 96}\n")
    status, _, err, configs = command("-m", "seed=1,2", "run=runs/${seed}", "optim.lr=0.1", "resume=true")
    assert (status, err) == (0, "")
    assert [(cfg.run, cfg.model.d_ff, cfg.optim.lr) for cfg in configs] == [
        ("runs/1", 96, 0.1), ("runs/2", Config().model.d_ff, 0.1),
    ]  # fmt: skip


def test_the_folders_of_a_sweep_say_what_was_swept(command, tmp_path):
    given = ["router.name=softmax,moe.routing.token_choice:TopKRouter", "optim.lr=1e-3,2e-3"]
    _, _, _, configs = command("-m", *given)
    names = [cfg.run.rpartition("-")[0].removeprefix("runs/cpu-small-") for cfg in configs]
    assert names == [
        "softmax-blend-softmax-lr0.001", "softmax-blend-softmax-lr0.002",
        "TopKRouter-blend-TopKRouter-lr0.001", "TopKRouter-blend-TopKRouter-lr0.002",
    ]  # fmt: skip
    command("-m", "seed=0,1")
    noted = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs").glob("*/") if list(path.iterdir()))
    assert noted == ["sweep-router-lr", "sweep-seed"]  # Hydra's note of the command is each sweep's own


def test_what_comes_after_a_sweep_may_refuse_in_one_sentence(monkeypatch, tmp_path, capsys):
    def refuse(results, keys):
        raise BadInput(f"{len(results)} results are too few.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=4,5"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="2"):
        cli.command("train", Config, after=refuse)(lambda cfg: None)()
    assert capsys.readouterr().err == "error: 2 results are too few.\n"


# Going on


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "two words",
        "a=b",
        "a,b",
        "it's",
        "'",
        "''",
        "back\\slash",
        "\\",
        "\\\\",
        "${x}",
        "\\${x}",
        "[1",
        "{",
        "é",
    ],
)
def test_a_verbatim_value_arrives_as_it_was_typed(value):
    line = cli.literal(f"prompt={value}", ("prompt",))
    (parsed,) = OverridesParser.create().parse_overrides([line])
    tree = OmegaConf.create({"prompt": parsed.value()})
    assert OmegaConf.to_container(tree, resolve=True) == {"prompt": value}
    assert cli.literal(f"other={value}", ("prompt",)) == f"other={value}"


@pytest.mark.parametrize(
    "given", [["-m", "--help"], ["--help", "-m", "seed=0,1"], ["--multirun", "router=softmax,hash", "--help"]]
)
def test_help_of_a_sweep_is_that_of_the_command(given, command):
    status, plain, err, _ = command("--help")
    assert (status, err) == (0, "")
    assert command(*given)[:3] == (0, plain, "")
    assert "optim.lr=0.5" in command(*given, "optim.lr=0.5")[1]


def test_help_of_a_sweep_over_what_is_not_there_is_refused(command):
    status, out, err, _ = command("-m", "--help", "router=softmax,sofmax")
    assert (status, out) == (2, "")
    assert err == "error: router=sofmax does not exist; did you mean softmax.\n"


def test_ctrl_c_while_a_command_is_imported_is_one_word_and_status_130(tmp_path):
    (tmp_path / "hydra.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train"],
        capture_output=True, text=True, cwd=cli.CONF.parent, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("output", ["a closed one", "a full disk", "no reader", "ascii"])
def test_a_command_ends_well_whatever_becomes_of_its_output(output, tmp_path):
    """A table that could not be written is one sentence; a reader who has enough is no mistake."""
    redirect = {"a closed one": ">&-", "a full disk": ">/dev/full", "no reader": "| true", "ascii": "| cat"}[output]
    command = f"set -o pipefail; {sys.executable} -m experiments.routers 'names=[softmax]' {redirect}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True, text=True, cwd=cli.CONF.parent, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    refused = {"a closed one": "it is closed", "a full disk": "No space left on device"}.get(output)
    said = f"error: standard output cannot be written ({refused}): give it another place to go.\n" if refused else ""
    assert (done.returncode, done.stderr) == (2 if refused else 0, said)
    assert done.stdout.isascii()
