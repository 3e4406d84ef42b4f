"""Tiny models with random weights, and a run's folder that holds one: for tests that need no training."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.parse import to_dict
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.data.tokenizer import train
from moe.model.transformer import Output, Transformer, model_tensors
from moe.run import checkpoint
from moe.train import state as state_module

BYTES = train(TokenizerConfig("byte"), [])
CONTEXT = 12
PROMPT = list(b"To be")
NEVER = -1  # an end-of-text id that no model says


def tiny(moe=True, position="rope", **changes):
    routed = MoEConfig(n_experts=4, k=2, d_expert=8, every=2) if moe else None
    changes = {"n_layers": 4, "context": CONTEXT, "init_std": 0.5} | changes
    return ModelConfig(
        vocab_size=257, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, position=position, moe=routed, **changes
    )


def build_model(*arguments, dtype=torch.float64, **keywords):
    return Transformer(tiny(*arguments, **keywords), RouterConfig()).initialize(0).to(dtype)


class Constant:
    """A model that always says the same logits, and routes as told."""

    def __init__(self, logits, routing=()):
        self.logits_V, self.routing = torch.tensor(logits), list(routing)
        self.cfg = tiny(n_layers=2)
        self.embed = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, tokens_BS, *, backend, cache=None):
        return Output(self.logits_V.expand(*tokens_BS.shape, -1), self.routing)


def write_run(run, model, weights, scores=None):
    """A run's folder as training leaves it, of a model's settings and its weights by step."""
    run.mkdir(parents=True)
    cfg = Config(run=str(run), model=model, router=RouterConfig(), tokenizer=TokenizerConfig("byte"))
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    (run / "tokenizer").mkdir()
    BYTES.save(run / "tokenizer")
    meta = {"tokenizer": BYTES.fingerprint}
    for step, tensors in weights.items():
        state = checkpoint.Snapshot(step=step, model=tensors, optimizer={}, meta=meta, rng=state_module.rng_state()[0])
        checkpoint.save(run / "checkpoints", state, keep=len(weights), score=scores and scores[step])
    return run


def random_weights(model, seed=0):
    """Of a model with these settings."""
    return model_tensors(Transformer(model, RouterConfig()).initialize(seed))


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run with checkpoints at steps 5 (the best), 9 and 12, as training leaves it."""
    scores = {5: 1.0, 9: 2.0, 12: 3.0}
    weights = {step: random_weights(tiny(), step) for step in scores}
    return write_run(tmp_path_factory.mktemp("runs") / "first", tiny(), weights, scores)


@pytest.fixture
def run(made_run, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made_run, tmp_path / "mine")
