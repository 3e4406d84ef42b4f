"""Claims about moe/config/tune.py: what its words mean, and what is refused."""

import pytest

from moe.config.model import ModelConfig, MoEConfig
from moe.config.run import build, fingerprint
from moe.config.tune import PARTS, TuneConfig, validate
from moe.errors import BadInput

MODEL = ModelConfig(n_layers=3, moe=MoEConfig(n_experts=4, k=2, d_expert=8, first_dense=1))


def test_all_is_trained_unless_it_is_said_and_with_a_rank_attention_and_experts():
    assert TuneConfig().trained() == PARTS
    assert TuneConfig(rank=4).trained() == ("attention", "experts")
    assert TuneConfig(["router"], rank=4).trained() == ("router",)


def test_an_expert_is_meant_in_its_layer_or_in_every_one():
    assert TuneConfig(experts=["3", "1:0", "1:3"]).chosen(MODEL) == {1: [0, 3], 2: [3]}
    assert TuneConfig(experts=["2:1"]).chosen(MODEL) == {1: [], 2: [1]}
    assert TuneConfig().chosen(MODEL) == {}


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (TuneConfig(["routers"]), "tune.parts has 'routers': accepted are embeddings,"),
        (TuneConfig(["mlp", "mlp"]), "names a part twice"),
        (TuneConfig(["router"], rank=2), "tune.rank=2 needs one of attention, experts, mlp"),
        (TuneConfig(experts=["4"]), "the experts of layer 1 are 0 to 3"),
        (TuneConfig(experts=["0:1"]), r"layer 0 has no experts; MoE layers are \[1, 2\]"),
        (TuneConfig(experts=["a:1"]), "accepted are EXPERT, as 3, and LAYER:EXPERT"),
        (TuneConfig(experts=["1:2:3"]), "accepted are EXPERT, as 3, and LAYER:EXPERT"),
        (TuneConfig(["attention"], ["1:2"]), "leaves the experts out"),
        (TuneConfig(alpha=8.0), "tune.alpha=8.0 scales low-rank changes"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(cfg, why):
    with pytest.raises(BadInput, match=why):
        validate(cfg, MODEL)


def test_a_dense_model_has_no_experts_to_choose():
    dense = ModelConfig(n_layers=3, moe=None)
    with pytest.raises(BadInput, match="a dense model does not have"):
        validate(TuneConfig(["experts"]), dense)
    with pytest.raises(BadInput, match="means nothing to a dense model"):
        validate(TuneConfig(experts=["3"]), dense)


def test_muon_takes_whole_matrices_alone():
    with pytest.raises(BadInput, match=r"optim\.name=muon orthogonalises whole matrices"):
        build({"optim": {"name": "muon"}, "tune": {"rank": 2}})


def test_a_run_that_trains_all_has_the_name_it_always_had():
    assert fingerprint(build({})) == fingerprint(build({"tune": {"parts": [], "rank": 0}}))
    assert fingerprint(build({})) != fingerprint(build({"tune": {"parts": ["attention"]}}))
