"""Claims about runs that begin with weights from elsewhere."""

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments.study.start import start_run
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run.folder import read_config
from moe.run.load import load_run
from tests.small_runs import settings, silent, train


@pytest.fixture
def begin(corpus, tmp_path):
    """(changes of settings) -> settings, tensors and text of a run that is not there yet."""

    def make(changes=None):
        cfg = settings(corpus, tmp_path / "run", changes)
        dataset = prepare(cfg.data, cfg.tokenizer, silent)
        model = dataclasses.replace(cfg.model, vocab_size=dataset.tokenizer.vocab_size)
        return cfg, model_tensors(Transformer(model, cfg.router, cfg.balance).initialize(7)), dataset

    return make


def test_a_started_run_holds_the_weights_to_the_bit_and_trains_on_from_step_0(begin):
    cfg, tensors, dataset = begin({"dispatch": "torch"})
    resolved, state = start_run(cfg, tensors, dataset, dataset.tokenizer, silent)
    assert sorted(path.name for path in Path(cfg.run).iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]
    assert read_config(Path(cfg.run)) == resolved
    assert (state.step, resolved.model.vocab_size) == (0, dataset.tokenizer.vocab_size)
    kept = model_tensors(load_run(Path(cfg.run), "last")[0])
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    summary = train(dataclasses.replace(resolved, resume=True))
    assert summary.steps == cfg.train.steps


def test_weights_that_do_not_fit_leave_no_folder(begin):
    cfg, tensors, dataset = begin()
    del tensors["norm.weight"]
    with pytest.raises(BadInput, match=r"norm\.weight"):
        start_run(cfg, tensors, dataset, dataset.tokenizer, silent)
    assert not Path(cfg.run).exists()
    assert list(Path(cfg.run).parent.iterdir()) == []
