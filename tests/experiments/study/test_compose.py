"""Claims about how a study's file and a command line become jobs."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import experiments.cli
import experiments.refusals
import experiments.study.compose
import experiments.sweeps
from experiments.study import compose
from experiments.study.compose import SweepConfig, compose_jobs, plan, text_of
from experiments.study.manifest import config_of
from moe.config.run import Config
from moe.errors import BadInput
from moe.model import cost


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """(name, settings) puts a file into conf/experiment, of a copy of conf/."""
    folder = tmp_path / "conf"
    shutil.copytree(experiments.refusals.CONF, folder)
    for module in (experiments.cli, experiments.refusals, experiments.study.compose, experiments.sweeps):
        monkeypatch.setattr(module, "CONF", folder)
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema_sweep", node=SweepConfig)

    def write(name: str, tree: dict) -> None:
        text = f"# @package _global_\n{yaml.safe_dump(tree, sort_keys=False)}"
        Path(folder, "experiment", f"{name}.yaml").write_text(text)

    return write


def jobs(*words: str) -> list[tuple[str, int, Config]]:
    """(arm, seed, settings) of every job."""
    return [(arm.name, cfg.seed, cfg) for arm, cfg in compose_jobs(list(words)).jobs]


def names(*words: str) -> list[tuple[str, int]]:
    return [(arm, seed) for arm, seed, _ in jobs(*words)]


def test_what_is_swept_on_the_command_line_is_crossed_and_seeds_are_no_arms(conf):
    found = jobs("model=cpu-nano", "router=softmax,hash", "seed=0,1", "optim.lr=1e-3,2e-3")
    assert [(arm, seed) for arm, seed, _ in found] == [
        (f"{router}-lr{lr}", seed) for router in ("softmax", "hash") for lr in ("0.001", "0.002") for seed in (0, 1)
    ]
    assert {(cfg.router.name, cfg.balance.aux, cfg.optim.lr, cfg.seed) for _, _, cfg in found} == {
        (router, aux, lr, seed) for router, aux in (("softmax", 0.01), ("hash", 0.0))
        for lr in (1e-3, 2e-3) for seed in (0, 1)
    }  # fmt: skip


def test_hydra_composes_once_per_arm_and_sets_the_seeds_in_it(conf, monkeypatch):
    composed = []
    inner = experiments.cli.compose
    monkeypatch.setattr(experiments.cli, "compose", lambda *given: composed.append(given) or inner(*given))
    found = jobs("model=cpu-nano", "router=softmax,hash", "seed=range(300,309)", "tokenizer.vocab_size=${seed}")
    assert (len(found), len(composed)) == (18, 3)  # once more for what all have in common
    assert all(cfg.tokenizer.vocab_size == seed for _, seed, cfg in found)  # also what refers to it


def test_a_file_may_carry_its_sweep_and_the_command_line_goes_first(conf):
    conf("mine", {"hydra": {"sweeper": {"params": {"router": "softmax,hash", "seed": "0,1"}}}, "train": {"steps": 9}})
    assert names("experiment=mine") == [("softmax", 0), ("softmax", 1), ("hash", 0), ("hash", 1)]
    assert names("experiment=mine", "router=sigmoid", "seed=4,5") == [("mine", 4), ("mine", 5)]
    assert {cfg.train.steps for _, _, cfg in jobs("experiment=mine")} == {9}


def test_arms_have_names_overrides_and_the_seeds_of_the_study(conf):
    arms = {"plain": "", "hashed": "router=hash optim.lr=2e-3", "deep": ["model.n_layers=3", "router=switch"]}
    conf("mine", {"study": {"arms": arms, "seeds": [3, 5], "base": "hashed", "margin": 0.5}})
    asked = compose_jobs(["experiment=mine"])
    assert [(arm.name, cfg.seed) for arm, cfg in asked.jobs] == [(arm, seed) for arm in arms for seed in (3, 5)]
    by_arm = {arm.name: cfg for arm, cfg in asked.jobs}
    assert (by_arm["plain"].router.name, by_arm["plain"].model.n_layers) == (Config().router.name, 4)
    assert (by_arm["hashed"].router.name, by_arm["hashed"].optim.lr, by_arm["hashed"].balance.aux) == ("hash", 2e-3, 0)
    assert (by_arm["deep"].model.n_layers, by_arm["deep"].model.moe.k) == (3, 1)
    assert (asked.base, asked.cfg.study.margin, asked.name) == ("hashed", 0.5, "mine")
    assert names("experiment=mine", "seed=8")[:2] == [("plain", 8), ("hashed", 8)]
    conf("mine", {"study": {"arms": {"plain": "", "deep": "router=switch"}, "seeds": [3, 5]}})
    assert names("experiment=mine", "optim.lr=0.5,0.25", "seed=3") == [
        ("plain-lr0.5", 3), ("plain-lr0.25", 3), ("deep-lr0.5", 3), ("deep-lr0.25", 3),
    ]  # fmt: skip


def test_arms_may_differ_in_what_a_router_of_ones_own_reads(conf):
    own = "router.name=moe.routing.token_choice:TopKRouter"
    swept = jobs("model=cpu-nano", own, "router.options.a=1,2")
    assert [(arm, cfg.router.options) for arm, _, cfg in swept] == [("a1", {"a": 1}), ("a2", {"a": 2})]
    arms = {"one": f"{own} router.options.a=1", "both": f"{own} 'router.options={{a: 2, b: x}}'"}
    conf("mine", {"study": {"arms": arms}})
    assert [cfg.router.options for _, _, cfg in jobs("experiment=mine")] == [{"a": 1}, {"a": 2, "b": "x"}]
    said = ["study.arms.p='router=softmax'", "study.arms.q='router=hash'"]
    assert names("model=cpu-nano", *said, "seed=3") == [("p", 3), ("q", 3)]


def test_the_base_is_the_first_arm_unless_it_is_named(conf):
    assert compose_jobs(["model=cpu-nano", "router=hash,softmax"]).base == "hash"
    assert compose_jobs(["model=cpu-nano", "router=hash,softmax", "study.base=softmax"]).base == "softmax"
    conf("mine", {"study": {"arms": {"plain": "", "deep": "router=switch"}, "seeds": [3, 5], "base": "deep"}})
    assert compose_jobs(["experiment=mine"]).base == "deep"
    assert compose_jobs(["experiment=mine", "optim.lr=0.5,0.25"]).base == "deep-lr0.5"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=cpu-nano"], "nothing is swept: name several values (router=softmax,hash seed=0,1,2)"),
        (["optim.rl=1,2"], "optim.rl is not a setting; did you mean optim.lr."),
        (["router=softmax,hahs"], "router=hahs does not exist; did you mean hash."),
        (["router=glob(zz*)"], "router=glob(zz*) matches nothing"),
        (["router="], "router= does not exist"),
        (["seed=a,b"], "seed=a,b must be whole numbers."),
        (["seed=1,1"], "seed=1,1 names a value twice"),
        (["study.seeds=[1,1]"], "study.seeds=[1, 1] names a seed twice"),
        (["run=a,b"], "run=a,b cannot be swept over: it is of the study, not of a run."),
        (["workers=1,2"], "workers=1,2 cannot be swept over"),
        (["router=softmax,hash", "study.base=softmx"], "study.base=softmx is no arm of this study; did you mean softm"),
        (["router=softmax,hash", "model.moe.k=99"], "model.moe.k=99 exceeds model.moe.n_experts=16: "),
        (["seed=0,1", "study.margin=-1"], "study.margin=-1.0 is out of range: accepted is a finite number of at least"),
        (["seed=0,1", "study.twin=flop"], "study.twin=flop is not one of , active_params, flops, total_params; did"),
        (["seed=0,1", "workers=0"], "workers=0 is out of range: accepted is between 1 and 1024."),
    ],
)  # fmt: skip
def test_what_cannot_be_a_study_is_one_sentence(words, sentence, conf):
    with pytest.raises(BadInput) as refused:
        compose_jobs(words)
    assert str(refused.value).startswith(sentence), refused.value


@pytest.mark.parametrize(
    ("arm", "words", "sentence"),
    [
        ("optim.rl=1", [], "study.arms.a: optim.rl is not a setting; did you mean optim.lr."),
        ("seed=1", [], "study.arms.a: seed=1 is of the study, and the same in every arm"),
        ("run=x", [], "study.arms.a: run=x is of the study"),
        ("optim.lr=1,2", [], "study.arms.a: optim.lr=1,2 has several values, and an arm has one"),
        ("model.moe.k=99", [], "model.moe.k=99 exceeds model.moe.n_experts=16: "),
        (3, [], "study.arms.a=3 must be overrides"),
        ("x='", [], 'study.arms.a="x=\'" cannot be read: No closing quotation.'),
        ("optim.lr=1e-3", ["optim.lr=2e-3"], "study.arms.a sets optim.lr, which optim.lr=2e-3 sets too."),
        ("optim.lr=1e-3", ["optim.lr=1,2"], "study.arms.a sets optim.lr, which the sweep sets too."),
    ],
)
def test_what_cannot_be_an_arm_is_one_sentence(arm, words, sentence, conf):
    conf("mine", {"study": {"arms": {"a": arm, "b": ""}}})
    with pytest.raises(BadInput) as refused:
        compose_jobs(["experiment=mine", *words])
    assert str(refused.value).startswith(sentence), refused.value


def test_what_is_wrong_in_a_file_is_said_of_the_file(conf):
    conf("mine", {"hydra": {"sweeper": {"params": {"rooter": "softmax,hash"}}}})
    with pytest.raises(
        BadInput, match=r"^hydra\.sweeper\.params of conf/experiment/mine\.yaml: rooter is not a setting"
    ):
        compose_jobs(["experiment=mine"])
    conf("mine", {"hydra": {"sweeper": {"params": {"seed": "0,1"}}}, "study": {"seeds": [1, 2]}})
    with pytest.raises(BadInput, match=r"^seed is swept over, and study\.seeds=\[1, 2\] are given too"):
        compose_jobs(["experiment=mine"])
    conf("mine", {"study": {"margins": 1}})
    with pytest.raises(BadInput, match=r"^study\.margins is not a setting; did you mean study\.margin"):
        compose_jobs(["experiment=mine"])


# A search


def test_a_search_has_what_its_trials_start_from_for_every_seed_and_no_job_yet(conf):
    lines = {"optim.lr": "log 1e-3 3e-2", "model.moe.k": "choice 1,2"}
    conf("mine", {"study": {"search": lines, "trials": 6, "seeds": [3, 5]}, "train": {"steps": 9}})
    asked = compose_jobs(["experiment=mine", "router=sigmoid"])
    study = plan(asked, {text_of(cfg): 257 for _, cfg in asked.jobs}, "bf16", "command", "commit")
    assert (study.name, study.jobs, study.base) == ("mine", [], "")
    assert (study.search.space, study.search.n_trials, study.search.sampler_seed) == (lines, 6, 0)
    for seed, tree in zip((3, 5), study.search.settings, strict=True):
        assert (tree["seed"], tree["train"]["steps"], tree["router"]["name"]) == (seed, 9, "sigmoid")
        assert (tree["train"]["precision"], tree["model"]["vocab_size"]) == ("bf16", 257)
    words = ["study.search={optim.lr: log 1e-3 3e-2, model.moe.k: 'choice 1,2'}", "study.trials=6"]
    other = planned(*words, "study.sampler_seed=4")
    assert (other.search.space, other.search.sampler_seed, len(other.search.settings)) == (lines, 4, 1)
    assert planned("study.search.optim.lr=log 1 2", "study.trials=2").search.space == {"optim.lr": "log 1 2"}


LR = "study.search.optim.lr=log 1e-3 3e-2"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([LR], "study.trials=0 is no search: name how many trials study.search is to have, like 20."),
        (["study.trials=5", "seed=0,1"], "study.trials=5 is of a search, and study.search names no setting."),
        ([LR, "study.trials=-1"], "study.trials=-1 is out of range"),
        (
            [LR, "study.trials=5", "study.arms={a: 'router=hash'}"],
            "study.search and study.arms do not go together",
        ),
        ([LR, "study.trials=5", "study.twin=flops"], "study.search and study.twin do not go together"),
        ([LR, "study.trials=5", "router=softmax,hash"], "study.search and router do not go together"),
        ([LR, "study.trials=5", "optim.lr=0.1"], "study.search.optim.lr=log 1e-3 3e-2 is over what optim.lr=0.1 sets"),
        (
            ["study.search.optim.rl=log 1 2", "study.trials=5"],
            "study.search: optim.rl is not a setting; did you mean opt",
        ),
        (["study.search.optim.lr=log 2 1", "study.trials=5"], "study.search.optim.lr=log 2 1 is an empty range"),
        (
            ["study.search.model.moe.k=choice 1 2", "study.trials=5"],
            "study.trials=5 are more than the 2 that study.sea",
        ),
    ],
)
def test_what_cannot_be_a_search_is_one_sentence(words, sentence, conf):
    with pytest.raises(BadInput) as refused:
        compose_jobs(["model=cpu-nano", *words])
    assert str(refused.value).startswith(sentence), refused.value


def test_a_search_over_a_group_that_is_null_and_one_without_optuna_are_refused(conf, monkeypatch):
    with pytest.raises(BadInput, match=r"^study\.search\.model\.moe\.k means nothing here: moe is null in these"):
        planned("model.moe=null", "study.search.model.moe.k=choice 1 2", "study.trials=2")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BadInput, match=r"^study\.search needs the package optuna, which is not installed"):
        compose_jobs(["model=cpu-nano", LR, "study.trials=5"])


# The plan


def planned(*words: str, precision: str = "bf16"):
    asked = compose_jobs(["model=cpu-nano", "tokenizer=byte", *words])
    return plan(asked, {text_of(cfg): 257 for _, cfg in asked.jobs}, precision, "command", "commit")


def test_what_was_open_is_decided_once_for_all(conf):
    study = planned("router=softmax,hash", "seed=0,1")
    for job in study.jobs:
        cfg = config_of(job)
        assert (cfg.train.precision, cfg.model.vocab_size, cfg.run, cfg.resume) == ("bf16", 257, "", False)
    assert (study.precision, study.command, study.commit, study.base) == ("bf16", "command", "commit", "softmax")
    assert study.jobs[0].overrides == ["router=softmax", "seed=0"]
    asked = planned("router=softmax,hash", "train.precision=fp32")
    assert {config_of(job).train.precision for job in asked.jobs} == {"fp32"}


def test_a_run_has_the_same_id_in_every_study(conf):
    one, other = planned("router=softmax,hash", "seed=0,1"), planned("router=hash,sigmoid", "seed=1,2", "workers=3")
    ids = [{job.id for job in study.jobs} for study in (one, other)]
    assert [len(each) for each in ids] == [4, 4]
    assert ids[0] & ids[1] == {job.id for job in one.jobs if (job.arm, job.seed) == ("hash", 1)}


def test_every_moe_gets_the_twin_that_the_comparison_would_give_it(conf):
    study = planned("router=softmax,hash,dense", "seed=0,1", "study.twin=active_params")
    assert study.arms[:3] == ["softmax", "hash", "dense"]
    assert len(study.jobs) == 2 * len(study.arms)
    for arm, twin in study.twins.items():
        moe, dense = (config_of(next(job for job in study.jobs if job.arm == name)) for name in (arm, twin))
        assert dense.model == cost.dense_twin(moe.model, "active_params", moe.router, moe.balance)
        assert dense.router == Config().router


def test_arms_of_one_size_share_their_twin(conf):
    study = planned("router=softmax,sigmoid", "seed=0,1", "study.twin=active_params")
    assert study.twins == {"softmax": "dense twin", "sigmoid": "dense twin"}
    assert study.arms == ["softmax", "sigmoid", "dense twin"]
    assert len({job.id for job in study.jobs}) == 6


def test_arms_that_are_one_and_twins_of_nothing_are_refused(conf):
    with pytest.raises(BadInput, match="the arms every3 and every4 are the same run: each must differ in a setting"):
        planned("log.every=3,4")
    with pytest.raises(BadInput, match=r"study\.twin=flops needs an arm that is a Mixture-of-Experts model"):
        planned("model.moe=null", "seed=0,1", "study.twin=flops")
    with pytest.raises(
        BadInput, match=r"match=flops of model=cpu-nano is not known in advance.*\(in the arm top-p\)\."
    ):
        planned("router=softmax,top-p", "study.twin=flops")


STUDIES = [
    path.stem
    for path in sorted((experiments.refusals.CONF / "experiment").glob("*.yaml"))
    if "study:" in path.read_text()
]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_there_is_has_arms_that_differ_and_a_base_among_them(name, conf):
    asked = compose_jobs([f"experiment={name}"])
    study = plan(asked, {text_of(cfg): cfg.tokenizer.vocab_size for _, cfg in asked.jobs}, "fp32", "", None)
    assert len(study.arms) > 1
    assert study.base in study.arms
    assert study.name == name


def test_the_settings_of_a_study_are_no_settings_of_a_run():
    assert not {"workers", "again", "study", "slurm"} & set(Config.__dataclass_fields__)
    assert set(compose.OF_THE_STUDY) - {"run", "resume", "trust", "hydra"} == set(
        SweepConfig.__dataclass_fields__
    ) - set(Config.__dataclass_fields__)
