"""What every router of conf/router must hold.

What a router says of itself (causal, causal_in_eval, per_token, fixed_k, smooth) is held against what it does.
"""

import copy

import pytest
import torch

from kernels import reference
from moe.config.balance import BalanceConfig, validate
from moe.config.model import MoEConfig
from moe.config.train import OptimConfig
from moe.errors import BadInput
from moe.model.attention import KVCache
from moe.model.layer import LayerInput
from moe.model.transformer import next_token_loss
from moe.routing.build import build_router
from moe.routing.contract import DROPPED, UNUSED, Mixture, Routing
from moe.train import step
from moe.train.optimizer import build_optimizer
from tests.conftest import PRESETS
from tests.small_layers import (
    BACKENDS,
    EXACT,
    TRAINING,
    decide,
    experts_of,
    gradients_of,
    layer_of,
    model_of,
    objective,
    one_pass,
    run_layer,
    same_bits,
    states,
    token_ids,
)

# --- Accounting -------------------------------------------------------------------------------------------------------


@BACKENDS
@TRAINING
def test_every_row_and_every_token_is_accounted_for(make_layer, preset, backend, training):
    layer, x = layer_of(make_layer, preset, training=training), states()
    report = run_layer(layer, x, backend)[1]
    decision = decide(layer, x)
    if isinstance(decision, Mixture):  # rows are slots, and every token reads every expert
        assert report.count_E.tolist() == [2 * decision.dispatch_BSEP.shape[-1]] * 8
        assert report.expert.shape == (18, 8)
        torch.testing.assert_close(report.weight.sum(-1), torch.ones(18, dtype=torch.float64), **EXACT)
        return
    assert (report.token_N is None) == (decision.token_N is None)
    token_N, expert_N, _ = Routing(report.expert, report.weight, report.token_N).rows()
    pairs = [(t, e) for t, e in zip(token_N.tolist(), expert_N.tolist(), strict=True) if e >= 0]
    assert len(set(pairs)) == len(pairs), "a token takes an expert twice"
    assert (token_N.diff() >= 0).all()
    unused = (expert_N == UNUSED).sum()
    assert ((expert_N >= 0) | (expert_N == DROPPED) | (expert_N == UNUSED)).all()
    assert report.count_E.sum() + report.dropped + unused == expert_N.numel()
    n_experts = layer.router.n_experts
    assert report.count_E.tolist() == [sum(each == e for _, each in pairs) for e in range(n_experts)]
    assert report.wanted_E.tolist() == reference.count(decision.rows()[1], n_experts).tolist()
    assert (report.wanted_E.sum() - report.count_E.sum()) == report.dropped
    assert report.skipped == 18 - len({t for t, _ in pairs})
    if layer.router.fixed_k and not training:
        assert report.dropped == unused == report.skipped == 0
        assert report.count_E.sum() == 18 * layer.router.k


@TRAINING
def test_a_tokens_probabilities_sum_to_one(make_layer, preset, training):
    layer, x = layer_of(make_layer, preset, training=training), states()
    decision = decide(layer, x)
    if isinstance(decision, Mixture) or decision.logits_TE is None:
        assert preset.router.name in ("soft", "hash")
        return
    taken_T = torch.ones(18, dtype=torch.float64)
    if decision.score == "relu":  # probabilities of a token without a positive score are all 0
        taken_T = (decision.logits_TE > 0).any(-1).double()
    torch.testing.assert_close(decision.prob_TE().sum(-1), taken_T, **EXACT)
    torch.testing.assert_close(decision.prob_E, decision.prob_TE().sum(0), **EXACT)
    torch.testing.assert_close(decision.prob_E.sum(), taken_T.sum(), **EXACT)


# --- Experts ----------------------------------------------------------------------------------------------------------


@BACKENDS
def test_identical_experts_are_the_dense_mlp_times_the_sum_of_a_tokens_weights(make_layer, preset, backend):
    layer, x = layer_of(make_layer, preset), states()
    if preset.router.name == "soft":
        pytest.skip("every expert reads other mixtures of tokens")
    up, down = layer.experts.w_up_EFD, layer.experts.w_down_EDF
    with torch.no_grad():
        up[:], down[:] = up[:1].clone(), down[:1].clone()
        if layer.default_ED is not None:
            layer.default_ED.zero_()
        out, report = run_layer(layer, x, backend)
        rows = Routing(report.expert, report.weight, report.token_N)
        token_N, expert_N, weight_N = rows.rows()
        real_N = torch.where((expert_N >= 0) & (expert_N < layer.n_experts), weight_N, 0.0)
        total_T = torch.zeros(18, dtype=torch.float64).index_add(0, token_N, real_N)
        expected = (reference.activate(x @ up[0].T, "swiglu") @ down[0].T) * total_T.view(2, 9, 1)
        if layer.cheap is not None:
            expected += layer.cheap(x.flatten(0, 1), rows).view(x.shape)
    torch.testing.assert_close(out, expected, **EXACT)


@BACKENDS
def test_one_expert_is_the_dense_mlp_times_its_weight(make_layer, preset, backend):
    moe = dict(n_experts=1, k=1, n_null=0, n_copy=0, n_constant=0)
    try:
        validate([MoEConfig(**moe)], preset.router, preset.balance)
    except BadInput as refusal:
        assert preset.router.groups > 1 or preset.router.second == "random"
        pytest.skip(str(refusal))
    if preset.router.name == "soft":
        pytest.skip("the expert reads a mixture of tokens")
    layer, x = layer_of(make_layer, preset, **moe), states()
    with torch.no_grad():
        out, report = run_layer(layer, x, backend)
        dense = reference.activate(x @ layer.experts.w_up_EFD[0].T, "swiglu") @ layer.experts.w_down_EDF[0].T
    total_T = torch.zeros(18, dtype=torch.float64)
    token_N, expert_N, weight_N = Routing(report.expert, report.weight, report.token_N).rows()
    total_T.index_add_(0, token_N, torch.where(expert_N >= 0, weight_N, 0.0))
    torch.testing.assert_close(out, dense * total_T.view(2, 9, 1), **EXACT)
    if preset.router.name in ("softmax", "sinkhorn", "threshold", "top-p", "hash"):
        torch.testing.assert_close(out, dense, **EXACT)


@BACKENDS
def test_permuting_the_tokens_permutes_the_output(make_layer, preset, backend):
    """A batch's routers too, where no two scores tie; a soft one within a sequence."""
    layer, x = layer_of(make_layer, preset), states(1, 18)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    tokens = token_ids(x)
    moved = run_layer(layer, x[:, order], backend, tokens[:, order])[0]
    torch.testing.assert_close(moved, run_layer(layer, x, backend, tokens)[0][:, order], **EXACT)


def test_the_triton_kernels_give_the_references_output_and_gradients_in_training(make_layer, preset):
    layer, x = layer_of(make_layer, preset, training=True), states(1, 5)
    (out_reference, _, expected), (out, _, got) = one_pass(layer, x, "reference"), one_pass(layer, x, "triton")
    torch.testing.assert_close(out, out_reference, rtol=1e-11, atol=1e-11)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-11, msg=name)


# --- Time -------------------------------------------------------------------------------------------------------------


@BACKENDS
@TRAINING
def test_a_later_token_changes_no_earlier_logit_or_the_router_says_so(make_model, preset, backend, training):
    model = model_of(make_model, preset, training=training)
    router = model.routers()[0]
    promised = (router.causal and model.blocks[1].depth is None) if training else router.causal_in_eval
    tokens = torch.randint(0, 17, (1, 16), generator=torch.Generator().manual_seed(1))
    leak = 0.0
    with torch.no_grad():
        torch.manual_seed(7)
        before = model(tokens, backend=backend).logits_BSV
        for last in (1, 6, 13):
            changed = tokens.clone()
            changed[:, last:] = (changed[:, last:] + 1 + last) % 17
            torch.manual_seed(7)
            after = model(changed, backend=backend).logits_BSV
            leak = max(leak, (after - before)[:, :last].abs().max().item())
            assert (after - before)[:, last:].abs().max() > 1e-6
    if promised:
        assert leak <= 1e-12
    else:
        assert leak > 1e-9


def test_what_each_router_promises():
    """Named once, so that a promise is not dropped in silence."""
    promises = {}
    for name, preset in PRESETS.items():
        router = build_router(preset.router, 4, MoEConfig(**experts_of(preset)), vocab_size=3)
        promises[name] = (router.causal, router.causal_in_eval, router.per_token)
    never = {name for name, each in promises.items() if each == (False, False, False)}
    after_training = {name for name, each in promises.items() if each == (False, True, True)}
    assert never == {"expert-choice", "soft"}
    assert after_training == {"base", "sinkhorn", "expert-choice-predictor", "expert-choice-threshold"}
    assert {each for name, each in promises.items() if name not in never | after_training} == {(True, True, True)}


def test_cached_logits_are_the_uncached_where_a_token_decides_alone(make_model, preset, tokens):
    model = model_of(make_model, preset)
    if not model.routers()[0].per_token:
        pytest.skip("the router decides over what it is given at once")
    with torch.no_grad():
        whole = model(tokens).logits_BSV
        for chunks in ([4, 1, 6], [1] * 11):
            cache = KVCache(model.cfg, batch=2, dtype=torch.float64, device=tokens.device)
            parts = [model(part, cache=cache).logits_BSV for part in tokens.split(chunks, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


# --- Gradients --------------------------------------------------------------------------------------------------------


@TRAINING
def test_every_gradient_is_the_references(make_layer, preset, training):
    layer, x = layer_of(make_layer, preset, training=training), states()
    expected, got = gradients_of(layer, x, "reference"), gradients_of(layer, x, "torch")
    for name in expected:
        assert (expected[name] is None) == (got[name] is None), name
        if expected[name] is None:
            assert not dict(layer.named_parameters())[name].requires_grad or not training, name
            continue
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert not training or expected[name].norm() > 0, name


@TRAINING
def test_gradients_are_the_derivative_where_the_router_says_so(make_layer, preset, training):
    """On the reference; the other backends' gradients equal its. The random numbers are the same in every call, and no
    choice is near a tie. The predictor's loss is left out: it is made to tell the states nothing."""
    layer = layer_of(make_layer, preset, training=training, d_expert=2)
    if not layer.router.smooth:
        pytest.skip("an estimator's gradient is no derivative")
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def function(x, *values):
        given = dict(zip(parameters, values, strict=True))
        torch.manual_seed(7)
        out, report = torch.func.functional_call(layer, given, (x, "reference", LayerInput(token_ids(x).flatten())))
        return out, *(each for name, each in report.losses.items() if name != "predictor")

    inputs = (states(1, 5).requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_estimators_say_that_they_are_no_derivative(make_layer):
    smooth = {name: layer_of(make_layer, preset).router.smooth for name, preset in PRESETS.items()}
    assert {name for name, each in smooth.items() if not each} == {"default-vector", "sparsemixer", "straight-through"}


# --- The same again ---------------------------------------------------------------------------------------------------


@BACKENDS
def test_the_same_seed_gives_the_same_bits(make_layer, preset, backend):
    layer, x = layer_of(make_layer, preset, training=True), states()
    first, again = run_layer(layer, x, backend)[0], run_layer(layer, x, backend)[0]
    assert torch.equal(first, again)
    same_bits(gradients_of(layer, x, backend), gradients_of(layer, x, backend))


def test_activation_checkpointing_changes_no_bit(make_model, preset, tokens):
    model = model_of(make_model, preset, torch.float32, training=True)

    def gradients(**how):
        torch.manual_seed(7)
        model.zero_grad(set_to_none=True)
        out = model(tokens, **how)
        loss = next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:])
        loss = loss + sum(sum(each.losses.values()) for each in out.routing)
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    same_bits(gradients(), gradients(checkpoint_activations=True))


@TRAINING
def test_compiled_in_one_graph_is_the_same(make_layer, preset, training):
    """In training the gradients too, with the same random numbers."""
    layer, x = layer_of(make_layer, preset, training=training), states()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if training:
        expected, report, gradients = one_pass(layer, x, "torch")
        got, report_compiled, gradients_compiled = one_pass(compiled, x, "torch")
        for name, gradient in gradients_compiled.items():
            eager = gradients[name.removeprefix("_orig_mod.")]
            assert (gradient is None) == (eager is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, eager, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    else:
        with torch.no_grad():
            (expected, report), (got, report_compiled) = run_layer(layer, x), run_layer(compiled, x)
    torch.testing.assert_close(got, expected, **EXACT)
    assert torch.equal(report_compiled.count_E, report.count_E)
    assert torch.equal(report_compiled.expert, report.expert)


# --- Numbers ----------------------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_scores_are_float32_in_bf16_and_everything_is_finite(make_layer, preset, training, how):
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    layer, x = layer_of(make_layer, preset, dtype, training), states(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        decision = decide(layer, x)
        out, report = run_layer(layer, x)
        objective(out.float(), report).backward()
    if isinstance(decision, Mixture):
        assert {each.dtype for each in decision} == {torch.float32}
    else:
        floats = [each for each in decision[:6] if each is not None and each.is_floating_point()]
        assert {each.dtype for each in floats} == {torch.float32}
        assert all(each.isfinite().all() for each in floats)
    assert out.dtype in (dtype, torch.bfloat16)
    assert out.isfinite().all()
    assert all(each.isfinite() for each in report.losses.values())
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@BACKENDS
@TRAINING
@pytest.mark.parametrize("shape", [(1, 0), (1, 1)], ids=str)
def test_no_token_and_one_token_are_no_special_case(make_layer, preset, backend, training, shape):
    layer, x = layer_of(make_layer, preset, training=training), states(*shape)
    gradients = gradients_of(layer, x, backend)
    assert all(each.isfinite().all() for each in gradients.values() if each is not None)
    out, report = run_layer(layer, x, backend)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert all(each.isfinite().all() for each in report.losses.values())
    assert report.count_E.shape == report.wanted_E.shape == (layer.router.n_experts,)
    assert report.skipped <= shape[0] * shape[1]
    if shape[1] == 0 and preset.router.name != "soft":
        assert report.count_E.sum() == 0
    if training:
        layer.router.update(preset.balance, 0.1, report.wanted_E, report.observed)
    assert all(each.isfinite().all() for each in layer.state_dict().values())


@TRAINING
@pytest.mark.parametrize("size", [0.0, 1e30])
def test_equal_and_huge_logits_give_finite_outputs_and_gradients(make_layer, preset, training, size):
    layer, x = layer_of(make_layer, preset, training=training), states()
    with torch.no_grad():
        for name, p in layer.router.named_parameters():
            if name in ("w_ED", "w_phi", "w_predict_ED"):
                p.mul_(size)
    out, report = run_layer(layer, x)
    again = run_layer(layer, x)[0]
    assert torch.equal(out, again)
    assert out.isfinite().all()
    assert all(each.isfinite().all() for each in report.losses.values())
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    biased = preset.router.name == "hash" or preset.router.selection_bias
    if size == 0 and layer.router.fixed_k and not training and not biased:
        assert (report.expert == torch.arange(layer.router.k)).all()


@BACKENDS
@TRAINING
def test_one_infinite_logit_concerns_its_token_alone_and_is_not_hidden(make_layer, preset, backend, training):
    """The z-loss is not finite then, which ends a step of training before a parameter changes."""
    layer, x = layer_of(make_layer, preset, torch.float32, training), states(dtype=torch.float32)
    own = ":" in preset.router.name
    if own or preset.router.name in ("hash", "soft") or preset.router.logits == "cosine":
        pytest.skip("no logit of a table or a cosine is infinite; what it takes in a router of one's own is unknown")
    token, expert = 4, 2
    x[..., 0] = 0.0
    with torch.no_grad():
        layer.router.w_ED[expert] = 0.0
        layer.router.w_ED[expert, 0] = 3e38
        calm = run_layer(layer, x)[0].flatten(0, 1)
        x[0, token, 0] = 10.0
        out, report = run_layer(layer, x, backend)
    out = out.flatten(0, 1)
    assert decide(layer, x).logits_TE[token, expert] == torch.inf
    token_N, expert_N, _ = Routing(report.expert, report.weight, report.token_N).rows()
    assert ((expert_N >= -2) & (expert_N < layer.router.n_experts)).all()
    assert not report.z.isfinite()
    if layer.router.per_token and not training:
        others = [t for t in range(18) if t != token]
        torch.testing.assert_close(out[others], calm[others], rtol=1e-5, atol=1e-6)
    if preset.router.name in ("sigmoid", "base") and not training:
        assert expert in expert_N[token_N == token]
        assert out[token].isfinite().all()


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_router_trains_and_learns_what_it_should(make_model, preset, tokens, backend):
    balance = preset.balance
    if preset.router.selection_bias:
        balance = BalanceConfig(aux=0.0, z=0.0, bias_rate=0.01)
    validate([MoEConfig(**experts_of(preset))], preset.router, balance)
    preset = preset._replace(balance=balance)
    # Interpreted, a layer is slow: one of them and one step tell that the router learns from what the kernels report.
    every, steps = (2, 1) if backend == "triton" else (1, 2)
    model = model_of(make_model, preset, torch.float32, training=True, every=every)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        out = model(tokens, backend=backend)
        loss = next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        for each in out.routing:
            loss = loss + sum(step.coefficient(balance, key, 0.0) * value for key, value in each.losses.items())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        step.update_routers(model, [step.layer_totals(each, tokens.numel()) for each in out.routing], balance, 0.0)
    with torch.no_grad():
        out = model(tokens, backend=backend)
        losses.append(next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:]).item())
    after = model.state_dict()
    assert losses[-1] < losses[0]
    assert all(each.isfinite().all() for each in after.values())
    still = {key for key in before if torch.equal(before[key], after[key])}
    own = {key for key in after if ".router." in key}
    frozen = ("table_VK", *(("w_ED",) if preset.router.frozen else ()))
    kept = {key for key in own if key.endswith(frozen)}
    assert still == kept
    learnt = {
        ".bias_E": preset.router.selection_bias,
        "l1": preset.router.name == "relu",
        "cutoff_E": preset.router.causal == "threshold",
    }
    for suffix, there in learnt.items():
        assert any(key.endswith(suffix) for key in own) == there
