"""Shared by the tests of the model: every router's settings, every backend, and small models with odd sizes."""

import dataclasses
import gc
import importlib
import itertools
import os
import sys
from typing import Any

import hypothesis
import pytest
import torch

from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer
from tests.router_presets import Preset, different_layers, presets_of_routers
from tests.small_models import made_run, run  # noqa: F401 — fixtures: a run with untrained weights
from tests.small_runs import corpus, whole  # noqa: F401 — fixtures for every test of training runs

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as a kernel is defined, Triton's own too: whoever needs one imports it
# Makes its table of torch's functions here, before a test puts another in the place of one; it imports Triton.
importlib.import_module("torch._dynamo")

if "PYTEST_XDIST_WORKER" in os.environ:  # several of these share the cores: one thread each,
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and one for each process that a test starts

# The same examples on every run, and no folder of them in the repository.
hypothesis.settings.register_profile("claims", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("claims")

# Every preset of conf/router. One that is added takes part in the invariants without a change here.
PRESETS = presets_of_routers()
# Both values of all that the choice and the weights of a top-K router can differ in; for what is tested at every depth
# and size. test_gate holds the kernel to the reference in every combination.
ROUTERS = {
    "softmax": RouterConfig(),
    "sigmoid-raw-biased": RouterConfig("sigmoid", renormalize=False, selection_bias=True),
}


@pytest.fixture(scope="module", autouse=True)
def ranks_end():
    """No rank outlives the file of tests that asked for it."""
    yield
    if ranks := sys.modules.get("tests.ranks"):
        ranks.end_ranks()


@pytest.fixture(autouse=True)
def schemas_end():
    """A command finds no schema but its own, as in a process of its own: Hydra copies all of them as often as it
    composes."""
    kept = set(_schemas())
    yield
    for name in _schemas().keys() - kept:
        del _schemas()[name]


def _schemas() -> dict[str, Any]:
    """What Hydra has been told so far."""
    store = sys.modules.get("hydra.core.config_store")
    return store.ConfigStore.instance().repo if store else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--router", help="module:Class: hold this router to the invariants, instead of the library's own")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`preset`: every router with the balance and the experts it comes with. A test of a layer leaves out those that
    differ between layers alone."""
    own = metafunc.config.getoption("--router")
    presets = {own: Preset(RouterConfig(own), BalanceConfig(), {})} if own else PRESETS
    if "preset" in metafunc.fixturenames:
        if "make_layer" in metafunc.fixturenames and "make_model" not in metafunc.fixturenames:
            presets = different_layers(presets)
        metafunc.parametrize("preset", presets.values(), ids=presets, indirect=True)


def pytest_collection_finish() -> None:
    """Garbage collections need not walk over what stays to the end: every module and every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ROUTERS.values(), ids=ROUTERS)
def router(request: pytest.FixtureRequest) -> RouterConfig:
    """The settings of some softmax and sigmoid routers in turn."""
    return dataclasses.replace(request.param)


@pytest.fixture
def preset(request: pytest.FixtureRequest) -> Preset:
    """Each preset of conf/router in turn."""
    return request.param


@pytest.fixture(params=["reference", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


def _model_config(**changes) -> ModelConfig:
    moe = MoEConfig(n_experts=5, k=3, d_expert=7)
    shape = dict(vocab_size=17, context=16, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20)
    return ModelConfig(**{**shape, "name": "tiny", "init_std": 0.3, "moe": moe, **changes})


@pytest.fixture
def model_config():
    """(**changes) -> the settings of a tiny MoE model; E, K, D and F are no powers of two."""
    return _model_config


def _fill(module: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Weights and selection biases large enough for the choice of experts to be no accident of the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in itertools.chain(module.named_parameters(), module.named_buffers()):
            if each.is_floating_point() and each.dim() > 1 and name.split(".")[-1] not in ("cos_Sd", "sin_Sd"):
                each.normal_(0.0, 0.4, generator=generator)
            elif name.endswith("bias_E"):
                each.normal_(0.0, 0.1, generator=generator)
    module.to(dtype)


@pytest.fixture
def make_layer():
    """(router settings, dtype, seed, **changes to MoEConfig) -> an MoE layer with D=12."""

    def make(
        router: RouterConfig,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        activation: str = "swiglu",
        balance: BalanceConfig | None = None,
        **moe: Any,
    ) -> MoELayer:
        cfg = _model_config(moe=MoEConfig(**{"n_experts": 5, "k": 3, "d_expert": 7, **moe}), activation=activation)
        layer = MoELayer(cfg, cfg.moe, router, balance)
        _fill(layer, dtype, seed)
        return layer

    return make


@pytest.fixture
def make_model():
    """(router settings, dtype, seed, **changes to ModelConfig) -> a tiny transformer with random weights."""

    def make(
        router: RouterConfig | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        balance: BalanceConfig | None = None,
        **changes: Any,
    ) -> Transformer:
        model = Transformer(_model_config(**changes), router or RouterConfig(), balance)
        model.initialize(seed)
        _fill(model, dtype, seed)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 11) token ids of a vocabulary of 17."""
    return torch.randint(0, 17, (2, 11), generator=torch.Generator().manual_seed(1))
