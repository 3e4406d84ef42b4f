"""Claims about moe/convert/upcycle.py: which conversions preserve the function, and what is refused."""

import dataclasses

import pytest
import torch

from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.upcycle import grow, merge, prune, to_dense, upcycle
from moe.errors import BadInput
from moe.model.transformer import Transformer, load_model, model_tensors, next_token_loss
from moe.train.distill import distill_loss

TOKENS_BS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(1))
ACTIVATIONS = ("swiglu", "gelu")


def config(moe=None, **changes):
    shape = dict(vocab_size=17, context=16, n_layers=3, d_model=12, n_heads=2, d_ff=24, init_std=0.4)
    return ModelConfig(**{**shape, "moe": moe and MoEConfig(**moe), **changes})


def routed(n_experts=6, k=2, d_expert=24, **changes):
    return {"n_experts": n_experts, "k": k, "d_expert": d_expert, **changes}


def tensors_of(cfg, router=None, seed=0):
    return model_tensors(Transformer(cfg, router or RouterConfig()).initialize(seed).double())


def logits(tensors, cfg, router=None, backend="reference"):
    model = Transformer(cfg, router or RouterConfig()).double().eval()
    load_model(model, tensors)
    return model(TOKENS_BS, backend=backend).logits_BSV


def assert_same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b):
    return not torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --- dense to MoE ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "router", [RouterConfig(), RouterConfig("sigmoid", scale=2.5, selection_bias=True), RouterConfig("hash", scale=3.0)]
)
def test_copies_of_the_mlp_give_the_dense_models_logits(activation, tied, router):
    dense = config(activation=activation, tie_embeddings=tied)
    target = dataclasses.replace(dense, moe=MoEConfig(**routed(k=3)))
    tensors = tensors_of(dense)
    new = upcycle(tensors, dense, target, "copy", 0, router=router)
    assert_same(logits(new, target, router), logits(tensors, dense))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("router", "moe"),
    [
        (RouterConfig(), routed(12, 3, 8)),
        (RouterConfig(scale=2.5), routed(12, 6, 8)),
        (RouterConfig("sigmoid", selection_bias=True), routed(8, 4, 12, every=2)),
        (RouterConfig("sigmoid", logits="cosine", noisy=True), routed(8, 4, 6, first_dense=1)),
        (RouterConfig(groups=2), routed(12, 3, 8)),
        (RouterConfig(shared=True), routed(12, 3, 8)),
        (RouterConfig(), routed(3, 3, 8)),
    ],
)
def test_slices_of_the_mlp_in_whole_groups_give_the_dense_models_logits(activation, router, moe):
    dense = config(activation=activation)
    target = dataclasses.replace(dense, moe=MoEConfig(**moe))
    tensors = tensors_of(dense)
    new = upcycle(tensors, dense, target, "split", 0, router=router)
    assert_same(logits(new, target, router), logits(tensors, dense))
    rows = next(each for name, each in new.items() if name.endswith("router.w_ED"))
    assert len(rows.unique(dim=0)) == moe["n_experts"] * moe["d_expert"] // 24


def test_raw_scores_preserve_the_function_where_router_logits_are_zero():
    dense = config()
    tensors = tensors_of(dense)
    for name in ("softmax", "sigmoid", "sqrt_softplus"):
        router = RouterConfig(name, renormalize=False, scale=1.5)
        for method, moe in (("copy", routed()), ("split", routed(8, 4, 6))):
            target = dataclasses.replace(dense, moe=MoEConfig(**moe))
            new = upcycle(tensors, dense, target, method, 0, router=router)
            for key in new:
                if key.endswith("w_ED"):
                    new[key].zero_()
            assert_same(logits(new, target, router), logits(tensors, dense))


RAW = {
    "softmax": (RouterConfig(renormalize=False, scale=1.5), routed()),
    "sinkhorn": (RouterConfig("sinkhorn", renormalize=False), routed()),
    "base": (RouterConfig("base"), routed(k=1)),
    "sparsemixer": (RouterConfig(renormalize=False, gradient="sparsemixer"), routed(k=3)),
    "expert-choice": (RouterConfig("expert-choice"), routed(k=6)),
    "threshold": (RouterConfig("threshold"), routed()),
    "top-p": (RouterConfig("top-p"), routed()),
}


@pytest.mark.parametrize("name", RAW)
def test_copies_under_every_raw_score_are_the_dense_model_where_router_logits_are_zero(name):
    router, moe = RAW[name]
    dense, target, tensors = config(), config(moe), tensors_of(config())
    new = upcycle(tensors, dense, target, "copy", 0, router=router)
    for key in new:
        if key.endswith("w_ED"):
            new[key].zero_()
    assert_same(logits(new, target, router), logits(tensors, dense))


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig("relu"),
        RouterConfig("soft"),
        RouterConfig("threshold", renormalize=False),
        RouterConfig("top-p", renormalize=False),
    ],
    ids=lambda each: each.name,
)
def test_a_router_whose_weights_have_no_known_sum_is_refused(router):
    dense, target, tensors = config(), config(routed()), tensors_of(config())
    with pytest.raises(BadInput, match=rf"router.name={router.name}.* is not known"):
        upcycle(tensors, dense, target, "copy", 0, router=router)
    with pytest.raises(BadInput, match=rf"router.name={router.name}.* is not known"):
        to_dense(tensors_of(target, router), target, router=router)


def test_layers_may_have_numbers_of_experts_of_their_own():
    dense, tensors = config(), tensors_of(config())
    target = config(routed(n_experts_by_layer=[2, 3, 4], k_by_layer=[1, 2, 3]))
    assert_same(logits(upcycle(tensors, dense, target, "copy", 0), target), logits(tensors, dense))


def test_noise_parts_the_experts_and_is_of_the_size_asked_for():
    dense, target, tensors = config(d_ff=256), config(routed(d_expert=256), d_ff=256), tensors_of(config(d_ff=256))
    exact = upcycle(tensors, dense, target, "copy", 0)
    new = upcycle(tensors, dense, target, "noise", 0, noise=0.1)
    for name in ("w_up_EFD", "w_down_EDF"):
        key = f"blocks.1.mlp.experts.{name}"
        share_E = (new[key] - exact[key]).flatten(1).std(1) / exact[key].flatten(1).std(1)
        assert_same(share_E, torch.full_like(share_E, 0.1), 0.05)
        assert len(new[key].flatten(1).unique(dim=0)) == 6
    none = upcycle(tensors, dense, target, "noise", 0)
    assert all(torch.equal(none[name], exact[name]) for name in exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_drop_draws_a_share_of_the_hidden_channels_anew_in_gate_up_and_down_alike(activation):
    dense = config(activation=activation, d_ff=400)
    target = dataclasses.replace(dense, moe=MoEConfig(**routed(3, 2, 400)))
    tensors = tensors_of(dense)
    for name, each in tensors.items():  # a mean other than 0, and another size in the gate than in the up projection
        if name.endswith("up.weight"):
            each[400:] *= 3
            each += 1.0
    exact, new = (upcycle(tensors, dense, target, method, 0, drop=0.3) for method in ("copy", "drop"))
    parts = 2 if activation == "swiglu" else 1
    up, down = "blocks.0.mlp.experts.w_up_EFD", "blocks.0.mlp.experts.w_down_EDF"
    changed_EPF = (new[up] != exact[up]).all(-1).unflatten(1, (parts, 400))
    assert (new[up] != exact[up]).any(-1).sum() == changed_EPF.sum()  # whole rows
    changed_EF = (new[down] != exact[down]).all(1)
    assert (changed_EPF == changed_EF[:, None]).all()
    assert changed_EF.sum(1).tolist() == [120] * 3
    assert len(changed_EF.unique(dim=0)) == 3
    for p in range(parts):
        redrawn = new[up].unflatten(1, (parts, 400))[:, p][changed_EF]
        old = tensors["blocks.0.mlp.up.weight"].unflatten(0, (parts, 400))[p]
        assert abs(redrawn.mean() - old.mean()) < 0.1 * old.std()
        assert abs(redrawn.std() / old.std() - 1) < 0.1


def test_dropping_nothing_is_copying():
    dense, target, tensors = config(), config(routed()), tensors_of(config())
    a, b = (upcycle(tensors, dense, target, method, 0, drop=0.0) for method in ("copy", "drop"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "moe"), [("copy", routed()), ("noise", routed()), ("split", routed(6, 3, 8)), ("drop", routed())]
)
def test_every_tensor_is_there_new_determined_by_the_seed_and_learns(method, moe):
    dense, target = config(), config(moe)
    tensors = {name: each.float() for name, each in tensors_of(dense).items()}
    before = {name: each.clone() for name, each in tensors.items()}
    results = [upcycle(tensors, dense, target, method, seed, noise=0.1) for seed in (0, 0, 1)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    router = "blocks.0.mlp.router.w_ED"
    assert differ(results[0][router], results[2][router])
    if method in ("noise", "drop"):
        assert differ(results[0]["blocks.0.mlp.experts.w_up_EFD"], results[2]["blocks.0.mlp.experts.w_up_EFD"])
    model = Transformer(target, RouterConfig())
    expected = model_tensors(model)
    assert {n: (t.shape, t.dtype) for n, t in results[0].items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    load_model(model, results[0])
    if method != "split":  # as `initialize` draws it
        assert torch.equal(results[0][router], model_tensors(Transformer(target, RouterConfig()).initialize(0))[router])
    next_token_loss(model(TOKENS_BS).logits_BSV, TOKENS_BS).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # Equal experts with renormalised weights give the same whatever the router says: no gradient but rounding.
    assert not [name for name in unused if "router" not in name]
    for each in results[0].values():
        each.zero_()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


# --- more experts, fewer experts ---

GROWN = [
    RouterConfig(),
    RouterConfig(renormalize=False, scale=2.0),
    RouterConfig("sigmoid", selection_bias=True),
    RouterConfig("sigmoid", renormalize=False, logits="cosine"),
    RouterConfig(shared=True),
    RouterConfig("relu"),
    RouterConfig("sinkhorn", renormalize=False),
    RouterConfig("threshold", threshold=1.2),
    RouterConfig("expert-choice", causal="threshold"),
    RouterConfig("expert-choice", causal="predictor"),
]


@pytest.mark.parametrize("router", GROWN)
def test_m_times_the_experts_with_m_times_k_compute_the_same(router):
    source, target = config(routed(5, 2, 7, n_shared=1)), config(routed(15, 6, 7, n_shared=1))
    tensors = tensors_of(source, router)
    for name, each in tensors.items():
        if name.endswith("bias_E"):
            each.normal_(generator=torch.Generator().manual_seed(0))
        if name.endswith("cutoff_E"):
            each.uniform_(0.1, 0.3, generator=torch.Generator().manual_seed(0))
    new = grow(tensors, source, target, 0.0, 0, router=router)
    assert_same(logits(new, target, router), logits(tensors, source, router))
    for name in ("w_up_EFD", "w_down_EDF"):
        key = f"blocks.1.mlp.experts.{name}"
        first, second, third = new[key].split(5)
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_cut_offs_of_probabilities_follow_the_number_of_experts():
    source, target = config(routed(6, 2, 7)), config(routed(3, 2, 7))
    router = RouterConfig("expert-choice", causal="threshold")
    tensors = tensors_of(source, router)
    new = prune(tensors, source, target, [[5, 0, 1]] * 3, router=router)
    assert_same(new["blocks.1.mlp.router.cutoff_E"], torch.full((3,), 1 / 3, dtype=torch.float64), 1e-7)


def test_noise_moves_the_rows_of_the_new_experts_alone():
    source, target = config(routed(4, 2, 7)), config(routed(8, 4, 7))
    tensors, key = tensors_of(source), "blocks.0.mlp.router.w_ED"
    new = [grow(tensors, source, target, 0.01, seed) for seed in (0, 0, 1)]
    assert torch.equal(new[0][key], new[1][key])
    assert not torch.equal(new[0][key], new[2][key])
    assert torch.equal(new[0][key][:4], tensors[key])
    ratio = (new[0][key][4:] - tensors[key]).std() / tensors[key].std()
    assert 0.005 < ratio < 0.02


def test_keeping_all_experts_in_another_order_computes_the_same():
    cfg = config(routed(5, 2, 7, every=2), n_layers=4)
    router = RouterConfig(selection_bias=True)
    tensors = tensors_of(cfg, router)
    new = prune(tensors, cfg, cfg, [[4, 2, 0, 1, 3], [1, 0, 3, 2, 4]], router=router)
    assert_same(logits(new, cfg, router), logits(tensors, cfg, router))
    same = prune(tensors, cfg, cfg, [range(5)] * 2, router=router)
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_experts_that_no_token_takes_can_go(name):
    source, target = config(routed(5, 2, 7)), config(routed(3, 2, 7))
    router = RouterConfig(name, selection_bias=True)
    tensors, keep = tensors_of(source, router), [[0, 2, 3], [4, 1, 2], [3, 0, 1]]
    for layer, kept in enumerate(keep):
        bias_E = tensors[f"blocks.{layer}.mlp.router.bias_E"]
        bias_E.fill_(-10.0)
        # Softmax probabilities grow when experts go, and only equal biases leave their order as it was.
        bias_E[kept] = torch.tensor([0.0, 0.1, -0.1] if name == "sigmoid" else [0.1] * 3, dtype=torch.float64)
    new = prune(tensors, source, target, keep, router=router)
    assert_same(logits(new, target, router), logits(tensors, source, router))


# --- many models into one, and back ---


def test_equal_models_merge_into_the_model_they_are():
    dense, target, tensors = config(), config(routed(3, first_dense=1)), tensors_of(config())
    router = RouterConfig(scale=2.0)
    new = merge([tensors] * 3, dense, target, 0, router=router)
    assert_same(logits(new, target, router), logits(tensors, dense))


def test_a_merged_model_has_each_models_mlp_and_the_mean_of_the_rest():
    dense, target = config(), config(routed(3, first_dense=1))
    models = [tensors_of(dense, seed=seed) for seed in range(3)]
    new = merge(models, dense, target, 0)
    for i, each in enumerate(models):
        assert torch.equal(new["blocks.1.mlp.experts.w_up_EFD"][i], each["blocks.1.mlp.up.weight"])
        assert torch.equal(new["blocks.1.mlp.experts.w_down_EDF"][i], each["blocks.1.mlp.down.weight"])
    for name in ("embed.weight", "blocks.0.mlp.up.weight", "blocks.2.attn.o.weight"):
        assert_same(new[name], sum(each[name] for each in models) / 3)
    model = Transformer(target, RouterConfig()).double()
    load_model(model, new)
    next_token_loss(model(TOKENS_BS).logits_BSV, TOKENS_BS).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_shared", [0, 2])
def test_a_dense_model_of_all_experts_is_the_moe_that_weighs_them_equally(activation, n_shared):
    source, router = config(routed(3, 3, 7, n_shared=n_shared), activation=activation), RouterConfig(scale=2.5)
    tensors = tensors_of(source, router)
    for name, each in tensors.items():
        if "router" in name:
            each.zero_()
    new, dense = to_dense(tensors, source, router=router)
    assert dense.moe is None
    assert dense.d_ff == 7 * (3 + n_shared)
    assert_same(logits(new, dense), logits(tensors, source, router))


def test_a_dense_model_is_made_of_the_busiest_experts():
    source = config(routed(4, 2, 7))
    tensors = tensors_of(source)
    counts = [[9, 0, 0, 5], [0, 1, 2, 0], [3, 3, 3, 3]]
    new, dense = to_dense(tensors, source, counts)
    assert dense.d_ff == 14
    for layer, experts in enumerate(([0, 3], [2, 1], [0, 1])):
        down_EDF = tensors[f"blocks.{layer}.mlp.experts.w_down_EDF"]
        assert_same(new[f"blocks.{layer}.mlp.down.weight"], torch.cat([down_EDF[e] for e in experts], 1) / 2)
    load_model(Transformer(dense, RouterConfig()), new)


def test_a_copied_model_returns_to_the_dense_one():
    dense, target, tensors = config(), config(routed(4, 1)), tensors_of(config())
    back, cfg = to_dense(upcycle(tensors, dense, target, "copy", 0), target)
    assert cfg == dense
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_an_moe_distils_into_its_dense_start():
    source = config(routed(4, 2, 8))
    tensors = tensors_of(source)
    new, dense = to_dense(tensors, source)
    teacher, student = logits(tensors, source).detach(), Transformer(dense, RouterConfig()).double()
    load_model(student, new)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = distill_loss(student(TOKENS_BS).logits_BSV, teacher, 2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("message", "dense", "target", "arguments"),
    [
        ("method=clone is not one of copy, noise, split, drop", {}, routed(), {"method": "clone"}),
        ("noise=-1", {}, routed(), {"noise": -1}),
        ("drop=1.5", {}, routed(), {"drop": 1.5}),
        ("set model.moe.d_expert=24", {}, routed(d_expert=8), {}),
        ("set model.moe.d_expert=24", {}, routed(d_expert=8), {"method": "drop"}),
        ("model.bias=true", {"bias": True}, routed(), {}),
        ("the target must be an MoE", {}, None, {}),
        ("n_shared=1", {}, routed(n_shared=1), {}),
        ("widths=", {}, routed(2, widths=[24, 8]), {}),
        ("n_null=2", {}, routed(n_null=2), {}),
        ("depth=0.5", {}, routed(depth=0.5), {}),
        ("d_expert=7 must divide", {}, routed(d_expert=7), {"method": "split"}),
        ("must be multiples", {}, routed(8, 3, 12), {"method": "split"}),
        ("must be multiples", {}, routed(7, 2, 12), {"method": "split"}),
        ("must be multiples", {}, routed(6, 2, 12), {"method": "split", "router": RouterConfig(groups=2)}),
        ("router.name=hash", {}, routed(8, 4, 12), {"method": "split", "router": RouterConfig("hash")}),
    ],
)
def test_upcycling_refuses_what_does_not_fit(message, dense, target, arguments):
    cfg = config(**dense)
    target = dataclasses.replace(cfg, moe=target and MoEConfig(**target))
    with pytest.raises(BadInput, match=message):
        upcycle(tensors_of(cfg), cfg, target, **{"method": "copy", "seed": 0} | arguments)


def test_upcycling_refuses_another_shape_and_a_source_with_experts():
    dense, tensors = config(), tensors_of(config())
    with pytest.raises(BadInput, match=r"model\.n_layers=2 of the target differs"):
        upcycle(tensors, dense, config(routed(), n_layers=2), "copy", 0)
    with pytest.raises(BadInput, match="should be"):
        upcycle(tensors, config(d_ff=32), config(routed(d_expert=32), d_ff=32), "copy", 0)
    with pytest.raises(BadInput, match="must be a dense model"):
        upcycle(tensors_of(config(routed())), config(routed()), config(routed()), "copy", 0)


@pytest.mark.parametrize("change", [{"expert_bias": True}, {"activation": "swiglu_clipped"}])
def test_experts_whose_parts_it_does_not_know_are_refused_in_every_direction(change):
    source, dense = config(routed(), **change), config(**change)
    for convert in (
        lambda: to_dense(tensors_of(source), source),
        lambda: grow(tensors_of(source), source, config(routed(12, 4), **change), noise=0.0, seed=0),
        lambda: upcycle(tensors_of(dense), dense, source, "copy", 0),
    ):
        with pytest.raises(
            BadInput, match=r"model\.expert_bias, router\.bias and model\.activation=swiglu_clipped are not"
        ):
            convert()


def test_growing_pruning_merging_and_densifying_refuse_what_does_not_fit():
    source, tensors = config(routed(4, 2, 7)), tensors_of(config(routed(4, 2, 7)))
    six = config(routed(6, 2, 7))
    three = config(routed(3, 2, 7))
    with pytest.raises(BadInput, match="6 experts in layer 0 are no multiple"):
        grow(tensors, source, six, 0.0, 0)
    with pytest.raises(BadInput, match="d_expert=8"):
        grow(tensors, source, config(routed(8, 2, 8)), 0.0, 0)
    with pytest.raises(BadInput, match="noise=-1"):
        grow(tensors, source, config(routed(8, 2, 7)), -1.0, 0)
    with pytest.raises(BadInput, match="other groups"):
        grow(tensors, source, config(routed(8, 2, 7)), 0.0, 0, router=RouterConfig(groups=2))
    with pytest.raises(BadInput, match=r"router\.name=hash"):
        grow(tensors, source, config(routed(8, 2, 7)), 0.0, 0, router=RouterConfig("hash"))
    with pytest.raises(BadInput, match=r"both have model\.moe"):
        prune(tensors, source, config(), [[0]] * 3)
    with pytest.raises(BadInput, match="2 lists for 3"):
        prune(tensors, source, three, [[0, 1, 2]] * 2)
    for bad in ([0, 1, 1], [0, 1, 4], [-1, 0, 1]):
        with pytest.raises(BadInput, match="distinct experts between 0 and 3"):
            prune(tensors, source, three, [[0, 1, 2], bad, [0, 1, 2]])
    with pytest.raises(BadInput, match="keep has 2 experts for layer 1"):
        prune(tensors, source, three, [[0, 1, 2], [0, 1], [0, 1, 2]])
    shared = RouterConfig(shared=True)
    with pytest.raises(BadInput, match="the same experts in each"):
        prune(tensors_of(source, shared), source, three, [[0, 1, 2], [0, 1, 3], [0, 1, 2]], router=shared)
    dense, models = config(), [tensors_of(config(), seed=seed) for seed in range(2)]
    with pytest.raises(BadInput, match=r"2 models of model\.d_ff=24"):
        merge(models, dense, config(routed(3)), 0)
    with pytest.raises(BadInput, match="no model to merge"):
        merge([], dense, config(routed(3)), 0)
    with pytest.raises(BadInput, match="should be"):
        merge([models[0], tensors_of(config(d_ff=32))], dense, config(routed(2)), 0)
    with pytest.raises(BadInput, match="dense already"):
        to_dense(models[0], dense)
    with pytest.raises(BadInput, match="counts must have"):
        to_dense(tensors, source, [[1, 2, 3, 4]] * 2)
    uneven = config(routed(4, 2, 7, first_dense=1))
    with pytest.raises(BadInput, match=r"widths \[14, 24\]"):
        to_dense(tensors_of(uneven), uneven)
    gated = config(routed(4, 2, 7, n_shared=1, shared_gate=True))
    with pytest.raises(BadInput, match="shared_gate"):
        to_dense(tensors_of(gated), gated)
    passing = config(routed(4, 2, 7, depth=0.5))
    with pytest.raises(BadInput, match=r"depth=0\.5"):
        to_dense(tensors_of(passing), passing)
