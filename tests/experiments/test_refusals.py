"""Claims about what the command line refuses: each in one sentence, whoever would have said it otherwise."""

import shutil

import pytest

from experiments import cli, generate, refusals

REFUSED = {
    # misspelt names
    "modle=cpu-nano": "modle is not a setting; did you mean model.",
    "model.n_layer=2": "model.n_layer is not a setting; did you mean model.n_layers.",
    "optim.lrr=1": "optim.lrr is not a setting; did you mean optim.lr.",
    "train.batchsize=4": "train.batchsize is not a setting; did you mean train.batch_size.",
    "model.moe.experts=4": "model.moe.experts is not a setting; did you mean model.moe.n_experts.",
    "data.clean.htm=false": "data.clean.htm is not a setting; did you mean data.clean.html.",
    "+foo=1": "foo is not a setting; accepted here: balance, ",
    "optim.lr.x=1": "optim.lr.x is not a setting; ",
    # misspelt choices
    "model=cpu-nanno": "model=cpu-nanno does not exist; did you mean cpu-nano.",
    "router=sofmax": "router=sofmax does not exist; did you mean softmax.",
    "tokenizer=bite": "tokenizer=bite does not exist; did you mean byte.",
    "data=wikipedia": "data=wikipedia does not exist; accepted here: blend, ",
    "router.name=softmx": "router.name=softmx is not one of softmax, sigmoid, ",
    "train.precision=fp64": "train.precision=fp64 is not one of auto, bf16, fp32",
    # wrong types
    "seed=abc": "seed=abc must be a whole number.",
    "seed=1.5": "seed=1.5 must be a whole number.",
    "train.steps=[1,2]": "train.steps=[1,2] must be a whole number.",
    "optim.lr=fast": "optim.lr=fast must be a number.",
    "optim.betas=[a,b]": "optim.betas=[a,b] must be a list of numbers, like [0.1,0.2].",
    "resume=perhaps": "resume=perhaps must be true or false.",
    "seed=": "seed= must be a whole number.",
    "seed=null": "seed=null must be a whole number.",
    "model.moe=4": "model.moe=4 must be a group of settings, or null.",
    # impossible values and pairs
    "model.moe.k=99": "model.moe.k=99 exceeds model.moe.n_experts=16",
    "model.d_model=30": "model.d_model=30 is not divisible by model.n_heads=4",
    "optim.lr=nan": "optim.lr=nan is out of range",
    "seed=-1": "seed=-1 is out of range",
    "train.accumulate=3": "train.accumulate=3 must divide train.batch_size=8 evenly",
    "balance=bias": "balance.bias_rate=0.001 needs a selection bias",
    "data=text": "data.name=text needs data.path",
    "model.moe=null model.moe.k=2": "model.moe is null here",
    "model=gpt2 model.moe.k=2": "model.moe is null here",
    "model=gpt2 model.moe={k:2}": "model.moe is null here",
    "model.latent.kv_rank=2": "model.latent is null here",
    "model=cpu-latent model.n_kv_heads=2": "model.n_kv_heads=2 has no meaning with model.latent: accepted is 0 or 4.",
    # sweeps
    "seed=0,1": "seed=0,1 has several values: add --multirun",
    "router=softmax,sigmoid": "router=softmax,sigmoid has several values: add --multirun",
    "-m seed=0,abc": "seed=abc must be a whole number (in the sweep's job seed=abc).",
    "-m router=softmax,sigmiod": "router=sigmiod does not exist; did you mean sigmoid.",
    "-m seed=0,-1": "seed=-1 is out of range: accepted is a finite number of at least 0 (in the sweep's job seed=-1).",
    "-m model.moe.k=2,99 seed=0,1": "model.moe.k=99 exceeds model.moe.n_experts=16",
    "-m model.moe.k=1,2 router=softmax-raw,softmax": "router.renormalize=true with model.moe.k=1 makes every weight 1",
    "-m router=glob(x*)": "router=glob(x*) matches nothing; accepted here: base, ",
    "-m seed=interval(0,1)": "seed=interval(0,1) cannot be swept over: name its values",
    "--multirun seed=0,1 optim.lrr=1": "optim.lrr is not a setting",
    # what cannot be read
    "{a": "cannot read {a: a setting is given as key=value.",
    "optim.betas=[0.9": "cannot read optim.betas=[0.9: its brackets or quotes are not in pairs.",
    "seed": "cannot read seed: a setting is given as key=value.",
    "seed=${nothing}": "seed=${nothing} cannot be resolved: there is no setting nothing.",
    "run=${oc.env:NO_SUCH}": "run=${oc.env:NO_SUCH} cannot be resolved: the environment variable NO_SUCH is not set.",
    "~optim.lr": "~optim.lr takes a setting away, and every one is needed",
    "hydra.nothing=1": "hydra.nothing is no setting of Hydra's",
    "=3": "a value without a setting cannot be given: write key=value.",
    # a setting of another group
    "steps=10": "steps is not a setting; did you mean train.steps.",
    "step=10": "step is not a setting; did you mean train.steps.",
    "lr=0.1": "lr is not a setting; did you mean optim.lr.",
    "optim.steps=10": "optim.steps is not a setting; did you mean train.steps.",
    "every=3": "every is not a setting; did you mean model.moe.every or checkpoint.every or log.every.",
    # names of one's own
    "router.options.a=1": "router.options={'a': 1} is read by a router of your own only, not by softmax.",
    "balance.schedule.auxx=[1]": "balance.schedule.auxx is not a coefficient",
    "balance.schedule.aux.x=1": "balance.schedule.aux.x is not a setting",
    "balance.schedule.aux=abc": "balance.schedule.aux=abc must be a list of numbers, like [0.1,0.2].",
    "balance.schedule={aux:[1,0]}": "balance.schedule.aux must be a list of numbers, like [0.1,0.2].",
    # other forms of an override
    "+optim.lr=1": "+optim.lr=1 adds a setting, and all that there are have a value: write optim.lr=1.",
    "+experiment=demo": "+experiment=demo adds a setting, and all that there are have a value: write experiment=demo.",
    "~optim": "~optim takes a setting away",
    "router@here=hash": "router@here=hash gives a group another place, and each has its own: write router=NAME.",
    "router=null": "router=null does not exist; accepted here: base, ",
    "model=${seed}": "model=${seed} refers to a setting, and a file of conf/ is read before there is one: name it.",
    "model.moe={k:a}": "model.moe.k=a must be a whole number.",
    "model.moe={kk:1}": "model.moe.kk is not a setting; did you mean model.moe.k.",
    # interpolations
    "run=${run}": "run=${run} cannot be resolved: it refers to itself.",
    "seed=${run}": "seed=${run} cannot be resolved: what it refers to is of another type.",
    "run=${who:1}": "run=${who:1} cannot be resolved: nothing is called who that could be asked.",
    "run='${a'": "run='${a' cannot be resolved: its ${...} is not whole.",
    "run=[a": "cannot read run=[a: its brackets or quotes are not in pairs; to take it as it stands type 'run=",
    # options
    "--hlep": "--hlep is no option; did you mean --help.",
    "--mulitrun": "--mulitrun is no option; did you mean --multirun.",
    "--nonsense": "--nonsense is no option: settings are given as key=value, and --help lists them.",
    "--cfg": "argument --cfg/-c: expected one argument.",
    "--run --multirun": "--run and --multirun do not go together: choose one.",
    "--config-name=x": "--config-name cannot be given: a command has its own settings, those of conf/.",
    "--experimental-rerun x": "--experimental-rerun cannot be given",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_sentence_on_stderr_and_status_2(line, command):
    status, out, err, configs = command(*line.split())
    assert status == cli.REFUSED == 2
    assert err.startswith(f"error: {REFUSED[line]}"), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.rstrip("\n")[-1] in ".)", err
    assert out == ""
    assert configs == []


FILES = {  # a file of conf/experiment, and what is said of it
    "defaults:\n  - override /model: cpu-nanno\n": "a file of conf/ asks for model=cpu-nanno, which does not exist;",
    "defaults:\n  - override /modle: x\n": "conf/experiment/mine.yaml overrides modle, and there is no such group",
    "optim:\n  lrr: 3\n": "optim.lrr is not a setting; did you mean optim.lr.",
    "optim:\n  lr: fast\n": "optim.lr=fast must be a number.",
    "optim: [1\n": "{file}, line 3 is no YAML: expected ',' or ']'",
    "optim:\n\tlr: 3\n": "{file}, line 3 is no YAML: found character",
    "3\n": "a file of conf/ holds no settings (experiment=mine)",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_of_ones_own_that_is_wrong_is_refused_in_one_sentence(text, command, tmp_path, monkeypatch):
    shutil.copytree(refusals.CONF, tmp_path / "conf")
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    file.write_text(f"# @package _global_\n{text}")
    for module in (cli, refusals):
        monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    status, _, err, configs = command("experiment=mine")
    assert (status, configs) == (2, [])
    assert err.startswith(f"error: {FILES[text].format(file=file)}"), err
    assert err.count("\n") == 1


def test_a_group_that_a_command_does_not_have_is_not_one_of_its_settings(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate", "router=hash"])
    with pytest.raises(SystemExit, match="2"):
        generate.main()
    assert capsys.readouterr().err.startswith("error: router is not a setting; ")
