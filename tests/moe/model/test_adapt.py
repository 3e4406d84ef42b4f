"""Claims about moe/model/adapt.py: what is trained, that all else stays to the bit, and that a merged model is one."""

import copy

import pytest
import torch

from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.config.tune import PARTS, TuneConfig
from moe.errors import BadInput
from moe.model.adapt import adapt, merged, part_of, unmerged
from moe.model.experts import Experts
from moe.model.transformer import Transformer, load_model, model_tensors, next_token_loss

MODEL = dict(n_layers=3, d_model=16, n_heads=2, d_ff=24, context=12, vocab_size=31, qk_norm="head")
MOE = MoEConfig(n_experts=4, k=2, d_expert=8, n_shared=1, first_dense=1)
TOKENS = torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(0))


def make(moe=MOE, **settings) -> Transformer:
    router = RouterConfig("sigmoid", selection_bias=True)
    return Transformer(ModelConfig(**MODEL | settings, moe=copy.deepcopy(moe)), router).initialize(0)


def train(model: Transformer, steps: int = 3) -> None:
    """A few steps of AdamW with weight decay, which moves whatever it is given."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        output = model(TOKENS[:, :-1])
        (next_token_loss(output.logits_BSV, TOKENS[:, 1:]) + sum(layer.aux for layer in output.routing)).backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in merged(model_tensors(model)).items()}


def test_every_parameter_belongs_to_a_part_and_every_part_has_some():
    models = [
        make(),
        make(position="learned", norm="layer", bias=True),
        make(MoEConfig(4, 2, 8, n_null=1, n_constant=2)),
    ]
    found = {part_of(name) for model in models for name, _ in model.named_parameters()}
    assert found == set(PARTS)
    for name in ("blocks.0.attn.q_norm.weight", "blocks.1.mlp_norm.weight", "norm.weight", "blocks.0.attn_norm.bias"):
        assert part_of(name) == "norms"
    assert part_of("blocks.1.mlp.shared.up.weight") == part_of("blocks.0.mlp.down.weight") == "mlp"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_part_alone_is_trained_and_all_else_keeps_its_bits(part, rank):
    model = make()
    before = plain(model)
    if rank and part not in ("attention", "experts", "mlp"):
        trained = TuneConfig(["attention", part], rank=rank)
    else:
        trained = TuneConfig([part], rank=rank)
    train(adapt(model, trained))
    changed = {name for name, tensor in plain(model).items() if not torch.equal(tensor, before[name])}
    assert {part_of(name) for name in changed} == set(trained.parts)


@pytest.mark.parametrize("rank", [0, 2])
def test_chosen_experts_alone_are_trained(rank):
    model = make()
    before = plain(model)
    train(adapt(model, TuneConfig(["experts"], ["1:3", "2:0", "2:2"], rank)))
    after = plain(model)
    for name, tensor in after.items():
        if "experts" not in name:
            assert torch.equal(tensor, before[name]), name
            continue
        moved = [e for e in range(4) if not torch.equal(tensor[e], before[name][e])]
        assert moved == {"1": [3], "2": [0, 2]}[name.split(".")[1]]


@pytest.mark.parametrize("cfg", [TuneConfig(rank=3), TuneConfig(["experts"], ["0"]), TuneConfig([], ["3"], 2, 5.0)])
def test_an_adapted_model_begins_as_it_was_and_merges_into_what_it_computes(cfg):
    model, whole = make(), make()
    expected = whole(TOKENS[:, :12]).logits_BSV
    adapt(model, cfg)
    torch.testing.assert_close(model(TOKENS[:, :12]).logits_BSV, expected, rtol=0, atol=0)
    train(model)
    load_model(whole, merged(model_tensors(model)))
    torch.testing.assert_close(whole(TOKENS[:, :12]).logits_BSV, model(TOKENS[:, :12]).logits_BSV, rtol=1e-6, atol=1e-6)
    assert (whole(TOKENS[:, :12]).logits_BSV - expected).abs().max() > 1e-3


def test_low_rank_changes_have_their_rank_and_each_expert_its_own():
    model = make()
    before = plain(model)
    train(adapt(model, TuneConfig(rank=2, alpha=6.0)))
    for name, tensor in plain(model).items():
        change = (tensor - before[name]).double()
        if part_of(name) in ("attention", "experts") and change.any():
            for matrix in change.view(-1, *change.shape[-2:]):
                assert torch.linalg.matrix_rank(matrix, atol=1e-5) == 2, name
    a = dict(model.named_parameters())["blocks.1.mlp.experts.parametrizations.w_up_EFD.0.a"]
    b = dict(model.named_parameters())["blocks.1.mlp.experts.parametrizations.w_up_EFD.0.b"]
    change = plain(model)["blocks.1.mlp.experts.w_up_EFD"] - before["blocks.1.mlp.experts.w_up_EFD"]
    torch.testing.assert_close(change, 3.0 * torch.einsum("eor,eri->eoi", b, a), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cfg", [TuneConfig(rank=3), TuneConfig(["experts"], ["0"])])
def test_weights_of_another_model_are_taken_under_an_adapters_names(cfg):
    other = make()
    train(other)
    model = adapt(make(), cfg)
    load_model(model, unmerged(model, model_tensors(other)))
    torch.testing.assert_close(model(TOKENS[:, :12]).logits_BSV, other(TOKENS[:, :12]).logits_BSV, rtol=1e-6, atol=1e-6)


def test_gradient_norms_are_those_of_the_experts_that_are_trained():
    model = adapt(make(), TuneConfig(["experts"], ["1:3", "1:1"]))
    next_token_loss(model(TOKENS[:, :-1]).logits_BSV, TOKENS[:, 1:]).backward()
    experts = model.blocks[1].mlp.experts
    assert isinstance(experts, Experts)
    norm_E = experts.gradient_norms()
    squares = [p.grad.double().square().sum((1, 2)) for p in experts.parameters() if p.grad is not None]
    torch.testing.assert_close(norm_E[[1, 3]].double(), sum(squares).sqrt(), rtol=1e-6, atol=0)
    assert norm_E[[0, 2]].tolist() == [0, 0]


def test_a_choice_that_trains_nothing_is_refused():
    model = Transformer(make().cfg, RouterConfig("hash")).initialize(0)
    with pytest.raises(BadInput, match="leaves nothing that is trained"):
        adapt(model, TuneConfig(["router"]))
