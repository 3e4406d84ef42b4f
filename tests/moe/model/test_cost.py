"""Sizes, costs and dense twins, against numbers from the papers and closed forms written apart from the code."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels import reference
from kernels.reference import activate
from moe.analysis.metrics import layer_metrics
from moe.config.balance import BalanceConfig, rows_vary
from moe.config.model import LatentConfig, MoEConfig, layer_moe
from moe.config.router import RouterConfig
from moe.config.run import build
from moe.errors import BadInput
from moe.model import cost
from moe.model.transformer import Transformer
from moe.train.step import layer_totals, update_routers
from tests.router_presets import presets_of_routers

FOLDER = Path(__file__).parents[3] / "conf" / "model"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352,
}
PRESETS_OF_ROUTERS = presets_of_routers()
MATCHES = ("active_params", "total_params", "flops")


def _preset(name, vocab_size=4096):
    cfg = build({"model": yaml.safe_load((FOLDER / f"{name}.yaml").read_text())}).model
    cfg.vocab_size = cfg.vocab_size or vocab_size
    return cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    assert cost.size(_preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize(("name", "total"), [("gpu-50m", 50e6), ("gpu-300m", 300e6), ("gpu-1b", 1e9)])
def test_presets_for_one_gpu_have_about_the_size_in_their_name(name, total):
    assert cost.size(_preset(name, vocab_size=32000)).total == pytest.approx(total, rel=0.25)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_bears_its_files_name(name):
    assert _preset(name).name == name


def _active(cfg):
    """Parameters that one token meets, summed layer by layer for the shapes of the presets."""
    d, moe = cfg.d_model, cfg.moe
    dim = cfg.head_dim or d // cfg.n_heads
    d_q, d_kv = dim * cfg.n_heads, dim * (cfg.n_kv_heads or cfg.n_heads)
    attention = d * (d_q + 2 * d_kv) + d_q * d + {"none": 0, "head": 2 * dim, "full": d_q + d_kv}[cfg.qk_norm]
    if cfg.latent is not None:
        heads, latent = cfg.n_heads, cfg.latent
        d_q, rank = heads * (latent.nope_dim + latent.rope_dim), latent.q_rank
        attention = d * rank + rank + rank * d_q if rank else d * d_q
        attention += d * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        attention += latent.kv_rank * heads * (latent.nope_dim + latent.v_dim) + heads * latent.v_dim * d
    matrices = 3 if cfg.activation.startswith("swiglu") else 2
    norm = d * (2 if cfg.norm == "layer" and cfg.bias else 1)
    total = cfg.vocab_size * d * (1 if cfg.tie_embeddings else 2) + norm
    total += cfg.context * d if cfg.position == "learned" else 0
    for layer in range(cfg.n_layers):
        total += 2 * norm + attention
        total += d_q + 2 * d_kv if cfg.bias or cfg.attn_bias != "none" else 0
        total += d if cfg.bias or cfg.attn_bias == "all" else 0
        total += cfg.n_heads if cfg.sinks else 0
        routed = moe is not None and layer >= moe.first_dense and layer % moe.every == moe.every - 1
        routed = routed and layer + moe.last_dense < cfg.n_layers
        if routed:
            total += d * moe.n_experts + matrices * d * moe.d_expert * (moe.k + moe.n_shared)
            total += moe.k * ((matrices - 1) * moe.d_expert + d) if cfg.expert_bias else 0
        else:
            total += matrices * d * cfg.d_ff + (cfg.d_ff + d if cfg.bias else 0)
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_active_parameters_of_presets_are_the_closed_form(name):
    assert cost.size(_preset(name)).active == _active(_preset(name))


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(n_experts=6, k=2, d_expert=5, n_shared=2),
        MoEConfig(n_experts=6, k=6, d_expert=5, every=2),
        MoEConfig(n_experts=6, k=1, d_expert=5, first_dense=2),
        MoEConfig(n_experts=6, k=1, d_expert=5, first_dense=1, last_dense=1),
    ],
    ids=["shared", "every", "first_dense", "last_dense"],
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "swiglu_clipped"])
@pytest.mark.parametrize("attn_bias", ["none", "qkv", "all"])
def test_active_parameters_of_patterns_are_the_closed_form(model_config, moe, activation, attn_bias):
    cfg = model_config(n_layers=4, moe=moe, activation=activation, attn_bias=attn_bias)
    assert cost.size(cfg).active == _active(cfg)


@pytest.mark.parametrize("expert_bias", [False, True])
def test_active_parameters_are_the_ones_with_a_gradient_from_one_token(make_model, expert_bias):
    moe = MoEConfig(n_experts=9, k=2, d_expert=5, n_shared=1)
    model = make_model(RouterConfig(renormalize=False), moe=moe, expert_bias=expert_bias)
    model(torch.tensor([[3]])).logits_BSV.sum().backward()
    touched = 0
    for name, p in model.named_parameters():
        touched += sum(e.numel() for e in p.grad if e.abs().sum() > 0) if ".experts." in name else p.numel()
    assert touched == cost.size(model.cfg).active


FLOP_MODELS = {
    "dense": dict(moe=None),
    "gelu, learned, one kv head": dict(moe=None, activation="gelu", position="learned", n_kv_heads=1),
    "moe": {},
    "latent": dict(latent=LatentConfig(5, 0, 3, 4, 7), head_dim=0, n_kv_heads=0),
    "latent queries too": dict(latent=LatentConfig(5, 6, 3, 4, 2), head_dim=0, n_kv_heads=0),
    "shared, every other, untied": dict(
        n_layers=4, tie_embeddings=False, moe=MoEConfig(n_experts=6, k=2, d_expert=5, n_shared=2, every=2)
    ),
}


@pytest.mark.parametrize("name", FLOP_MODELS)
def test_flops_are_what_torch_counts(make_model, name):
    """torch counts matmuls only, 2 per multiply-add, as we do. It does not see into custom ops nor into CPU flash
    attention: hence the reference backend and the plain attention kernel, which multiplies masked scores too, as we
    count them. Backward is twice forward because no matmul's input here goes without a gradient."""
    model, tokens = make_model(**FLOP_MODELS[name]), torch.zeros(2, 8, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        out = model(tokens, backend="reference")
    loss = out.logits_BSV.sum() + sum(each.aux for each in out.routing)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = cost.flops(model.cfg, context=8)
    assert forward.get_total_flops() == 2 * 8 * expected.forward
    assert forward.get_total_flops() + backward.get_total_flops() == 2 * 8 * expected.training


# Every form an expert or its layer has; the router is softmax.
FORMS = {
    "shared": dict(n_shared=2),
    "gated shared": dict(n_shared=2, shared_gate=True),
    "mixed widths": dict(widths=[4] * 32 + [12] * 32),
    "cheap experts": dict(n_null=3, n_copy=2, n_constant=5),
    "depth": dict(depth=0.3),
    "depth by a predictor": dict(depth=0.3, depth_causal="predictor", n_shared=1),
    "E and K by layer": dict(n_experts_by_layer=[64, 32], k_by_layer=[4, 8]),
}
CASES = {name: (preset.router, preset.balance, preset.moe) for name, preset in PRESETS_OF_ROUTERS.items()} | {
    name: (RouterConfig(), BalanceConfig(), form) for name, form in FORMS.items()
}


def _experts_at_once(x_TD, w_up_EFD, w_down_EDF, token_N, expert_N, weight_N, form, b_up_EF, b_down_ED):
    """`reference.experts` in two matmuls over all live rows, as 64 experts one by one take torch's counter seconds."""
    live_N = expert_N >= 0
    token_N, expert_N, weight_N = token_N[live_N], expert_N[live_N], weight_N[live_N]
    assert b_up_EF is b_down_ED is None
    h_NF = activate((x_TD[token_N, None] @ w_up_EFD[expert_N].mT)[:, 0], form)
    y_ND = (h_NF[:, None] @ w_down_EDF[expert_N].mT)[:, 0] * weight_N[:, None]
    return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)


def _counted(model, tokens):
    """FLOPs per token that torch counts forward and backward, and what experts computed (`LayerMetrics.rows`)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        out = model(tokens, backend="reference")
    loss = out.logits_BSV.sum() + sum(sum(layer.losses.values()) for layer in out.routing)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    rows = [
        layer_metrics(i, layer.count_E, 0, 0, tokens.numel(), layer_moe(model.cfg, i).work()).rows
        for i, layer in enumerate(out.routing)
    ]
    model.zero_grad()
    both = forward.get_total_flops() + backward.get_total_flops()
    return forward.get_total_flops() / tokens.numel(), both / tokens.numel(), sum(rows) / len(rows), out.routing


@pytest.mark.parametrize("name", CASES)
def test_flops_of_every_router_and_form_are_what_torch_counts_in_both_modes(make_model, name, monkeypatch):
    """At 64 experts, where logits weigh as much as experts. With the measured rows where, and only where, they vary."""
    monkeypatch.setattr(reference, "experts", _experts_at_once)
    router, balance, changes = CASES[name]
    moe = MoEConfig(**{"n_experts": 64, "k": 4, "d_expert": 8} | changes | ({"k": 64} if name == "dense" else {}))
    model = make_model(router, balance=balance, context=32, d_model=16, moe=moe)
    tokens = torch.randint(0, 17, (1, 32), generator=torch.Generator().manual_seed(1))

    forward, both, rows, routing = _counted(model.train(), tokens)
    vary = rows_vary(layer_moe(model.cfg, 0), router, balance)
    said = cost.flops(model.cfg, router, rows=rows if vary else None)
    assert (said.forward, said.training) == pytest.approx((forward, both), rel=0.002)

    # Routers that choose over the batch have learnt from the pass before to take as many of its tokens alone.
    update_routers(model, [layer_totals(layer, 32) for layer in routing], BalanceConfig(), 0.0)
    counted, _, rows, _ = _counted(model.eval(), tokens)
    learned = router.causal == "predictor" or moe.depth_causal == "predictor"
    if moe.depth < 1 and moe.depth_causal == "predictor":
        return  # how many tokens enter, to a gate and to shared experts, is not told apart by rows
    assert cost.flops(model.cfg, router, rows=rows if vary or learned else None).evaluation == pytest.approx(
        counted, rel=0.002
    )


@pytest.mark.parametrize("name", CASES)
def test_a_twin_of_flops_that_only_training_tells_needs_the_measured_rows(model_config, name):
    router, balance, changes = CASES[name]
    moe = MoEConfig(**{"n_experts": 64, "k": 4, "d_expert": 8} | changes | ({"k": 64} if name == "dense" else {}))
    cfg = model_config(moe=moe, d_model=16)
    if name in ("threshold", "top-p", "relu", "gshard", "switch", "mode", "moepp", "mixed widths", "cheap experts"):
        with pytest.raises(BadInput, match=r"^match=flops of model=tiny is not known in advance: with .* or set rows"):
            cost.dense_twin(cfg, "flops", router, balance)
        twin = cost.dense_twin(cfg, "flops", router, balance, rows=2.5)
        aim = cost.flops(cfg, router, rows=2.5).forward
    else:
        twin, aim = cost.dense_twin(cfg, "flops", router, balance), cost.flops(cfg, router).forward
    assert cost.flops(twin).forward == pytest.approx(aim, rel=0.01)


@pytest.mark.parametrize("router", [RouterConfig("soft"), RouterConfig("soft", slots=5)], ids=["K", "five slots"])
def test_a_soft_routers_flops_are_its_slots_and_its_mixing(make_model, router):
    """At the model's own context, as the number of slots goes by it."""
    model, tokens = make_model(router), torch.zeros(2, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(tokens, backend="reference")
    assert counted.get_total_flops() == 2 * 16 * cost.flops(model.cfg, router).forward
    assert cost.flops(model.cfg, router).forward > 1.2 * cost.flops(model.cfg).forward


def test_flops_are_at_the_models_own_context_unless_told(model_config):
    cfg = model_config()
    assert cost.flops(cfg) == cost.flops(cfg, context=16)
    longer = cost.flops(cfg, context=17).forward - cost.flops(cfg).forward
    assert longer == 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim


def _measure(cfg, match):
    return {
        "active_params": cost.size(cfg).active,
        "total_params": cost.size(cfg).total,
        "flops": cost.flops(cfg).forward,
    }[match]


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("name", [name for name in PRESETS if _preset(name).moe])
def test_a_dense_twin_is_within_one_percent_and_differs_in_the_feed_forward_alone(name, match):
    cfg = _preset(name)
    twin = cost.dense_twin(cfg, match)
    assert abs(_measure(twin, match) / _measure(cfg, match) - 1) <= 0.01
    assert twin.moe is None
    assert twin.d_ff % 8 == 0
    differing = {key for key in vars(cfg) if getattr(cfg, key) != getattr(twin, key)}
    assert differing <= {"name", "moe", "d_ff"}


@pytest.mark.parametrize("match", MATCHES)
def test_a_twin_matches_what_the_router_costs_too(match):
    cfg, router = _preset("cpu-nano"), RouterConfig("soft")
    twin, plain = cost.dense_twin(cfg, match, router), cost.dense_twin(cfg, match)
    aim = {
        "active_params": cost.size(cfg, router).active,
        "total_params": cost.size(cfg, router).total,
        "flops": cost.flops(cfg, router).forward,
    }[match]
    assert abs(_measure(twin, match) / aim - 1) <= 0.01
    assert twin.d_ff > plain.d_ff


@pytest.mark.parametrize("match", MATCHES)
def test_a_twin_takes_any_width_where_no_multiple_of_8_fits(model_config, match):
    cfg = model_config(n_layers=6, d_model=32, moe=MoEConfig(n_experts=7, k=3, d_expert=7))
    twin = cost.dense_twin(cfg, match)
    assert abs(_measure(twin, match) / _measure(cfg, match) - 1) <= 0.01


def test_no_twin_within_reach_is_refused_with_how_close_it_gets(model_config):
    cfg = model_config(n_layers=8, vocab_size=2, d_model=4, n_heads=1, n_kv_heads=0, moe=MoEConfig(2, 1, 1))
    best = min(
        abs(_measure(_dense(cfg, width), "total_params") / _measure(cfg, "total_params") - 1) for width in range(1, 9)
    )
    assert best > 0.01  # by trying every width
    with pytest.raises(
        BadInput, match=r"no dense twin of model=tiny comes within 1%.*d_ff=\d+, is [+-]\d+\.\d% off"
    ) as e:
        cost.dense_twin(cfg, "total_params")
    assert f"{best:.1%} off" in str(e.value)


def _dense(cfg, width):
    return build({"model": {**vars(cfg), "moe": None, "d_ff": width}}).model


def test_a_twin_of_a_dense_model_and_an_unknown_match_are_refused(model_config):
    with pytest.raises(BadInput, match=r"match=flops needs a Mixture-of-Experts model, and model=tiny has"):
        cost.dense_twin(model_config(moe=None), "flops")
    with pytest.raises(BadInput, match="match=params is not one of active_params, flops, total_params"):
        cost.dense_twin(model_config(), "params")


def test_sizes_are_those_of_a_model_that_is_built(model_config):
    cfg = model_config(moe=MoEConfig(n_experts=6, k=2, d_expert=5, n_shared=2))
    assert cost.size(cfg).total == sum(p.numel() for p in Transformer(cfg, RouterConfig()).parameters())
