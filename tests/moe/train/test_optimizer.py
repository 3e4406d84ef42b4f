"""Claims about AdamW, what Muon has beside it, and the learning-rate schedules."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moe.config.model import LatentConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.config.train import OptimConfig
from moe.model.transformer import hidden_matrices
from moe.train.optimizer import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer, set_learning_rates


def rates(cfg: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(cfg, step, steps) for step in range(1, steps + 1)]


def test_cosine_in_closed_form():
    cfg = OptimConfig(lr=2.0, warmup=4, final=0.1, schedule="cosine")
    found = rates(cfg, 20)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(5, 21):
        expected = 0.2 + 1.8 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert found[step - 1] == pytest.approx(expected, rel=1e-12)
    assert found[11] == pytest.approx(1.1)  # half way between peak and end
    assert found[-1] == pytest.approx(0.2)


def test_wsd_in_closed_form():
    cfg = OptimConfig(lr=1.0, warmup=2, final=0.0, decay=0.25, schedule="wsd")
    assert rates(cfg, 16) == pytest.approx([0.5, 1.0, *[1.0] * 10, 0.75, 0.5, 0.25, 0.0])


def test_constant_in_closed_form():
    assert rates(OptimConfig(lr=1.0, warmup=2, schedule="constant"), 5) == [0.5, 1.0, 1.0, 1.0, 1.0]


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_schedule_rises_to_the_peak_and_never_after(schedule, steps, warmup, final, decay):
    assume(warmup <= steps)
    cfg = OptimConfig(lr=3.0, warmup=warmup, final=final, decay=decay, schedule=schedule)
    found = rates(cfg, steps)
    assert all(0 <= rate <= 3 + 1e-12 for rate in found)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found[:warmup]))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise([3.0, *found[warmup:]]))
    if warmup < steps and schedule != "constant":
        assert found[-1] == pytest.approx(3 * final)


def test_matrices_decay_and_norms_and_biases_do_not(make_model):
    model = make_model(bias=True, norm="layer", position="learned")
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decays) == len(names)
    for name, p in names.items():
        free = "norm" in name or name.endswith("bias")
        assert decays[id(p)] == (0.0 if free else 0.3), name
    assert any("w_up_EFD" in name for name in names)


def test_a_selection_bias_is_no_parameter_of_the_optimiser(make_model):
    model = make_model(RouterConfig(selection_bias=True))
    held = {id(p) for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert not held & {id(buffer) for buffer in model.buffers()}
    assert held == {id(p) for p in model.parameters()}


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_steps_are_adamws(make_model):
    """Against the update rule written out (1711.05101, algorithm 2), decay apart from the gradient."""
    cfg = OptimConfig(lr=0.01, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.2, warmup=4)
    model = make_model(dtype=torch.float64)
    optimizer = build_optimizer(model, cfg)
    value = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(v) for name, v in value.items()}
    v = {name: torch.zeros_like(x) for name, x in value.items()}
    for step in range(1, 5):
        with_gradients(model, step)
        rate = 0.01 * step / 4
        set_learning_rates(optimizer, cfg, step, 4)
        optimizer.step()
        for name, p in model.named_parameters():
            m[name] = 0.8 * m[name] + 0.2 * p.grad
            v[name] = 0.9 * v[name] + 0.1 * p.grad**2
            decay = 0.2 if p.dim() >= 2 else 0.0
            update = (m[name] / (1 - 0.8**step)) / ((v[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            value[name] = value[name] - rate * decay * value[name] - rate * update
            torch.testing.assert_close(p.detach(), value[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimisers_state_makes_the_round_trip(make_model, name):
    """A restored optimiser takes the same next step, to the bit, and shares no memory with what it was given."""
    cfg = OptimConfig(name=name)
    one, two = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    first, second = build_optimizer(one, cfg), build_optimizer(two, cfg)
    for step in range(3):
        with_gradients(one, step)
        first.step()
    two.load_state_dict(one.state_dict())
    state = optimizer_tensors(one, first)
    n_matrices = len(hidden_matrices(one)) if name == "muon" else 0
    own = {"momentum_buffer"} if n_matrices else set()
    assert {key.split("/")[0] for key in state} == {"exp_avg", "exp_avg_sq", "step"} | own
    assert len(state) == 3 * len(list(one.parameters())) - 2 * n_matrices
    restore_optimizer(two, second, state)
    for model, optimizer in ((one, first), (two, second)):
        with_gradients(model, 9)
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


MUON = OptimConfig(name="muon")


def kinds(model, optimizer):
    """Which parameters have which kinds of state, after a step."""
    found = {}
    for key in optimizer_tensors(model, optimizer):
        kind, name = key.split("/", 1)
        found.setdefault(name, set()).add(kind)
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_between_embeddings_and_output_and_adamw_all_else(make_model, tied):
    moe = MoEConfig(n_experts=4, k=2, d_expert=16, n_shared=1, shared_gate=True, first_dense=1)
    model = make_model(moe=moe, position="learned", bias=True, tie_embeddings=tied)
    optimizer = build_optimizer(model, MUON)
    with_gradients(model, 0)
    optimizer.step()
    found = kinds(model, optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    matrices = ("q.weight", "k.weight", "v.weight", "o.weight", "up.weight", "down.weight", "w_up_EFD", "w_down_EDF")
    for name, its_kinds in found.items():
        muons = name.startswith("blocks.") and name.endswith(matrices)
        assert its_kinds == ({"momentum_buffer"} if muons else {"exp_avg", "exp_avg_sq", "step"}), name
    others = {name for name, its_kinds in found.items() if "exp_avg" in its_kinds}
    seen = {name.split(".", 2)[-1] for name in others}
    assert {
        "embed.weight",
        "position.weight",
        "mlp.router.w_ED",
        "mlp.shared_gate.weight",
        "attn.q.bias",
    } <= seen | others
    assert ("head.weight" in others) != tied


def test_a_gate_and_its_up_projection_are_two_matrices_and_other_weights_one(make_model):
    moe = MoEConfig(n_experts=4, k=2, d_expert=16, first_dense=1)
    for activation, parts in (("swiglu", 2), ("gelu", 1), ("swiglu_clipped", 1)):  # the last has them in turns
        found = hidden_matrices(make_model(activation=activation, moe=moe, expert_bias=True, sinks=True))
        assert not [name for name in found if "bias" in name or "sinks" in name]
        ups = {name: number for name, number in found.items() if name.endswith(("up.weight", "w_up_EFD"))}
        assert len(ups) >= 2
        assert set(ups.values()) == {parts}
        assert {number for name, number in found.items() if name not in ups} == {1}


def test_every_projection_of_latent_attention_is_a_matrix(make_model):
    model = make_model(latent=LatentConfig(5, 6, 3, 4, 7), head_dim=0, n_kv_heads=0, n_layers=1)
    found = [name.split(".")[3] for name in hidden_matrices(model) if ".attn." in name]
    assert sorted(found) == ["kv", "kv_down", "o", "q", "q_down"]


def test_frozen_weights_are_left_alone_by_muon_too(make_model):
    model = make_model(RouterConfig(frozen=True))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.blocks[0].attn.q.weight.requires_grad_(False)
    frozen["blocks.0.attn.q.weight"] = model.blocks[0].attn.q.weight.detach().clone()
    optimizer = build_optimizer(model, MUON)
    with_gradients(model, 0)
    optimizer.step()
    assert len(frozen) > 1
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else not torch.equal(p, torch.zeros_like(p))
    assert not frozen.keys() & kinds(model, optimizer).keys()


def test_muons_rate_has_the_same_schedule_from_its_own_peak(make_model):
    for muon_lr, peak in ((0.5, 0.5), (0.0, 0.1)):
        cfg = OptimConfig(name="muon", lr=0.1, muon_lr=muon_lr, warmup=2)
        optimizer = build_optimizer(make_model(), cfg)
        for step in (1, 2, 7, 10):
            lr = set_learning_rates(optimizer, cfg, step, 10)
            assert lr == learning_rate(cfg, step, 10)
            for group in optimizer.param_groups:
                ratio = peak / 0.1 if "parts" in group else 1
                assert group["lr"] == pytest.approx(ratio * lr, rel=1e-12)


def test_what_muon_leaves_to_adamw_steps_as_under_adamw_alone(make_model):
    one, two = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    two.load_state_dict(one.state_dict())
    for model, cfg in ((one, MUON), (two, OptimConfig())):
        optimizer = build_optimizer(model, cfg)
        for step in range(3):
            with_gradients(model, step)
            optimizer.step()
    matrices = hidden_matrices(one)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) != (name in matrices), name


def test_a_new_optimiser_has_no_state(make_model):
    model = make_model()
    assert optimizer_tensors(model, build_optimizer(model, OptimConfig())) == {}


@pytest.mark.parametrize("steps", [600, 800])
def test_the_default_runs_and_the_demo_rise_for_50_steps_to_the_digit(steps):
    assert rates(OptimConfig(lr=4e-3), steps) == rates(OptimConfig(lr=4e-3, warmup=50), steps)


def test_a_short_run_needs_no_other_setting():
    assert rates(OptimConfig(lr=1.0), 30)[:3] == [1 / 3, 2 / 3, 1.0]
    assert rates(OptimConfig(lr=1.0, final=0.0), 2) == [0.5, 0.0]
