"""Claims about what a run takes of the settings of the one whose weights it starts from."""

import copy
import shutil

import pytest
import yaml

from moe.config.data import TokenizerConfig
from moe.config.run import Config
from moe.errors import BadInput
from moe.run.source import adopt, read_source
from tests.small_models import tiny


@pytest.fixture
def source(made_run):
    return read_source(str(made_run), False)


def new(source, *keys, **changes):
    """`adopt` of the default settings with these changes, which `keys` (by default their names) give."""
    cfg = Config(source="runs/first", **changes)
    return adopt(cfg, *source, keys or list(changes))


def test_what_must_fit_the_weights_is_the_sources_and_the_rest_is_ones_own(source):
    cfg = new(source, seed=5)
    own, run = source
    assert (cfg.model, cfg.router, cfg.balance) == (own.model, own.router, own.balance)
    assert (cfg.seed, cfg.optim, cfg.train, cfg.run) == (5, Config().optim, Config().train, "")
    assert cfg.tokenizer == TokenizerConfig("byte")
    assert run is not None


def test_a_given_setting_lies_over_the_sources(source):
    own, _ = source
    k = copy.deepcopy(own.model)
    k.moe.k = 3
    cfg = new(source, "model.moe.k", "data.documents", model=k)
    assert cfg.model.moe.k == 3
    assert cfg.model.d_model == own.model.d_model
    cfg = new(source, "router", router=Config().router)
    assert cfg.router == Config().router


def test_a_learned_tokenizer_is_the_saved_one_where_the_text_is_another(source, made_run):
    own, run = source
    learned = copy.deepcopy(own)
    learned.tokenizer = TokenizerConfig("bpe", 512)
    same = adopt(Config(source="x"), learned, run, [])
    assert same.tokenizer == TokenizerConfig("bpe", 512)
    other = Config(source="x")
    other.data.max_mb = 7.0
    assert adopt(other, learned, run, []).tokenizer == TokenizerConfig("saved", 512, str(made_run))
    assert adopt(other, learned, None, []).tokenizer == TokenizerConfig("bpe", 512)
    other.source_state = "all"
    assert adopt(other, learned, run, []).tokenizer == TokenizerConfig("bpe", 512)


def test_a_recording_is_not_replayed_on_other_text(source):
    own, run = source
    recorded = copy.deepcopy(own)
    recorded.balance.force, recorded.balance.recorded = "recorded", "runs/there"
    assert adopt(Config(source="x"), recorded, run, []).balance == own.balance


UNFIT = {
    "width": ("model.d_model", 32, "model.d_model=32 does not fit the weights of source=runs/first, which have 16"),
    "layers": ("model.n_layers", 2, "model.n_layers=2 does not fit the weights of source=runs/first, which have 4"),
    "dense": ("model.moe", None, "model.moe=null does not fit the weights of source=runs/first, which have {...}"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_given_setting_that_the_weights_do_not_have_is_refused_by_name(what, source):
    key, value, sentence = UNFIT[what]
    model = copy.deepcopy(source[0].model)
    setattr(model, key.rpartition(".")[2], value)
    with pytest.raises(BadInput) as caught:
        new(source, key, model=model)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith("leave it out, and the source's own is taken.")


def test_of_a_whole_model_that_does_not_fit_those_settings_are_named_that_matter(source):
    model = tiny(n_layers=2)
    model.d_ff, model.rope_theta = 24, 5000.0
    with pytest.raises(BadInput, match=r"^model\.n_layers=2 .* which have 4 \(as do model\.d_ff\): "):
        new(source, "model", model=model)
    model = tiny(init_std=0.1)  # of no weight
    model.vocab_size = 0
    assert new(source, "model", model=model).model.vocab_size == source[0].model.vocab_size


def test_a_router_of_ones_own_that_a_source_names_is_asked_for(run):
    path = run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["router"]["name"] = "moe.routing.token_choice:TopKRouter"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=r"a class of one's own, and reading this run would import moe\.routing"):
        read_source(str(run), "softmax")
    assert read_source(str(run), True)[0].router.name.endswith("TopKRouter")


def test_a_folder_of_transformers_is_to_be_made_a_run_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"is a folder of transformers: make it a run first, .*experiments\.convert"):
        read_source(str(tmp_path), False)


@pytest.mark.parametrize("folder", ["nowhere", "first/tokenizer", "first/checkpoints"])
def test_a_folder_without_weights_is_no_source(folder, run, tmp_path):
    shutil.copytree(run, tmp_path / "first")
    with pytest.raises(BadInput, match="is neither a run's folder nor a checkpoint"):
        read_source(str(tmp_path / folder), False)
