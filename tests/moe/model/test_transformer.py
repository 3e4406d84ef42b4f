"""The transformer: initialisation, patterns of layers, variants, loss."""

import copy
import math

import numpy as np
import pytest
import torch

from moe.config.model import LatentConfig, ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.model.attention import KVCache
from moe.model.cost import dense_twin
from moe.model.experts import MLP
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer, next_token_loss


def _model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    return Transformer(cfg, RouterConfig()).initialize(seed)


def _loss(model, tokens, **how):
    out = model(tokens, **how)
    return next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:]) + sum(each.aux + each.z for each in out.routing)


def test_initialisation_is_a_function_of_the_seed_and_each_name(model_config):
    first, again, other = _model(model_config()), _model(model_config()), _model(model_config(), seed=1)
    deeper = dict(_model(model_config(n_layers=3, init_std=0.3)).named_parameters())
    for name, p in first.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name]), name
        if p.dim() > 1:
            assert not torch.equal(p, dict(other.named_parameters())[name]), name
            unscaled = p / deeper[name]  # one more layer changes the residual scale alone
            torch.testing.assert_close(unscaled, unscaled.flatten()[0].expand_as(p), rtol=1e-5, atol=0)


def test_no_two_tensors_start_alike(model_config):
    drawn = [p.flatten()[:20] for _, p in _model(model_config()).named_parameters() if p.dim() > 1]
    for i, first in enumerate(drawn):
        assert not any(torch.allclose(first / first.norm(), other / other.norm()) for other in drawn[i + 1 :])


def test_initialisation_ignores_and_leaves_the_global_generator(model_config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = Transformer(model_config(), RouterConfig())
    torch.manual_seed(5)
    first = [p.clone() for p in model.initialize(0).parameters()]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, model.initialize(0).parameters(), strict=True))


def test_a_model_and_its_dense_twin_start_with_the_same_common_weights(model_config):
    cfg = model_config(d_model=32, moe=MoEConfig(n_experts=8, k=2, d_expert=32))
    mine = dict(_model(cfg).named_parameters())
    twin = dict(_model(dense_twin(cfg, "active_params")).named_parameters())
    common = mine.keys() & twin.keys()
    assert {"embed.weight", "blocks.1.attn.q.weight", "blocks.0.mlp_norm.weight", "norm.weight"} <= common
    assert all(".mlp." in name for name in mine.keys() ^ twin.keys())
    assert all(torch.equal(mine[name], twin[name]) for name in common)


@pytest.mark.parametrize("n_layers", [1, 8])
def test_deviations_are_init_std_and_what_writes_to_the_stream_is_scaled_by_depth(model_config, n_layers):
    moe = MoEConfig(n_experts=4, k=2, d_expert=64, n_shared=1, every=2 if n_layers > 1 else 1)
    model = _model(model_config(d_model=64, d_ff=96, n_layers=n_layers, init_std=0.05, moe=moe, bias=True))
    writes = ("attn.o.weight", "mlp.down.weight", "shared.down.weight", "w_down_EDF")
    seen = set()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        kind = next((each for each in writes if name.endswith(each)), None)
        seen.add(kind)
        expected = 0.05 / math.sqrt(2 * n_layers) if kind else 0.05
        assert p.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
    assert seen == {None, *writes} - ({"mlp.down.weight"} if n_layers == 1 else set())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4, k=2, d_expert=16)], ids=["dense", "moe"])
def test_the_loss_of_an_untrained_model_is_near_ln_v(model_config, tie, moe):
    model = _model(model_config(vocab_size=200, context=64, d_model=32, init_std=0.02, tie_embeddings=tie, moe=moe))
    tokens = torch.randint(0, 200, (8, 65), generator=torch.Generator().manual_seed(0))
    loss = next_token_loss(model(tokens[:, :-1]).logits_BSV, tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(200), abs=0.03)


def test_tied_embeddings_are_one_parameter_and_untied_ones_two(make_model, tokens):
    tied, untied = make_model(tie_embeddings=True), make_model(tie_embeddings=False)
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 17 * 12
    with torch.no_grad():
        hidden = []
        tied.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        torch.testing.assert_close(tied(tokens).logits_BSV, hidden[0] @ tied.embed.weight.T)


def test_more_positions_than_the_context_are_refused_also_with_a_cache(make_model, tokens):
    model = make_model(context=11)
    model(tokens)
    with pytest.raises(ValueError, match=r"12 positions exceed model\.context=11"):
        model(torch.cat((tokens, tokens[:, :1]), 1))
    cache = KVCache(model.cfg, 2, torch.float64, tokens.device)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="12 positions exceed"):
            model(tokens[:, :1], cache=cache)
    assert cache.length == 11


VARIANTS = {
    "gpt2": dict(norm="layer", position="learned", bias=True, activation="gelu_tanh", n_kv_heads=0),
    "layer norm without bias": dict(norm="layer", activation="gelu"),
    "olmoe": dict(qk_norm="full", tie_embeddings=False, n_kv_heads=0),
    "qwen3": dict(qk_norm="head", head_dim=6),
    "relu2, one kv head": dict(activation="relu2", n_kv_heads=1),
    "qwen2": dict(attn_bias="qkv", n_kv_heads=1),
    "granite": dict(embed_scale=3.0, residual_scale=0.5, attn_scale=0.2, logit_divisor=2.0),
    "glm4": dict(rope_fraction=0.5, head_dim=8),
    "olmo2": dict(norm_at="after", qk_norm="full"),
    "windows": dict(window=4),
    "a window in one layer": dict(window=2, window_layers=[1], position="learned"),
    "derived head size": dict(head_dim=0, n_heads=3, n_kv_heads=0),
    "gpt-oss": dict(sinks=True, expert_bias=True, activation="swiglu_clipped", attn_bias="all"),
    "latent": dict(head_dim=0, n_kv_heads=0, latent=LatentConfig(5, 0, 3, 4, 7)),
    "latent queries too": dict(head_dim=0, n_kv_heads=0, n_heads=5, latent=LatentConfig(5, 6, 3, 4, 7)),
}
EXPERTS = {
    "dense": None,
    "moe": MoEConfig(n_experts=5, k=3, d_expert=7),
    "shared": MoEConfig(n_experts=5, k=3, d_expert=7, n_shared=2),
    "every other": MoEConfig(n_experts=5, k=3, d_expert=7, every=2),
}


@pytest.mark.parametrize("moe", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_every_variant_learns(make_model, tokens, variant, moe):
    position = VARIANTS[variant].get("position", "rope")
    model = make_model(**VARIANTS[variant], moe=EXPERTS[moe], context=11)
    _loss(model, tokens).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # A key bias moves every score of a query alike, which a softmax does not see (unless positions turn it).
        if not (name.endswith("attn.k.bias") and position == "learned"):
            assert p.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_same_with_either_backend_and_with_a_cache(make_model, tokens, variant):
    model = make_model(**VARIANTS[variant])
    cache = KVCache(model.cfg, 2, torch.float64, tokens.device)
    with torch.no_grad():
        expected = model(tokens, backend="reference").logits_BSV
        parts = [model(part, backend="torch", cache=cache).logits_BSV for part in tokens.split([5, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-11, atol=1e-11)


END = 16
LENGTHS = [[4, 1, 5, 3], [13]]  # of the documents of two windows; what the last one has beyond is cut off


def _windows(change=()):
    """(2, 13) tokens, documents of `LENGTHS`, each ended by `END` but the last ones; those in `change` are others."""
    generator, rows = torch.Generator().manual_seed(3), []
    for row, lengths in enumerate(LENGTHS):
        documents = [torch.randint(0, END, (length,), generator=generator) for length in lengths]
        for i, document in enumerate(documents):
            document.add_((row, i) in change).remainder_(END)
        for document in documents[:-1]:
            document[-1] = END
        rows.append(torch.cat(documents))
    return torch.stack(rows)


def _alone(model, tokens, **how):
    """Every document by itself in a model that knows of no documents: (2, 13, V)."""
    packed = copy.copy(model)
    packed.document_end = None
    rows = [row.split(lengths) for row, lengths in zip(tokens, LENGTHS, strict=True)]
    return torch.stack([torch.cat([packed(part[None], **how).logits_BSV[0] for part in row]) for row in rows])


@pytest.mark.parametrize("moe", ["dense", "shared"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_separate_documents_are_each_as_if_alone_and_so_are_their_gradients(make_model, variant, moe):
    model, tokens = make_model(**VARIANTS[variant], moe=EXPERTS[moe]), _windows()
    weights = torch.randn(2, 13, 17, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = _alone(model, tokens, backend="reference")
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.document_end = END
    for kept in (False, True):
        model.zero_grad()
        logits = model(tokens, checkpoint_activations=kept).logits_BSV
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        (logits * weights).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-10, msg=name)
    model.document_end = None
    assert (model(tokens).logits_BSV - expected)[0, 4:].abs().amax(-1).min() > 1e-3  # packed they are not


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_no_other_document_moves_a_documents_logits_nor_gets_a_gradient_of_them(make_model, position):
    model, states = make_model(position=position), []
    model.document_end = END
    model.embed.register_forward_hook(lambda module, inputs, output: states.append(output))
    tokens = _windows()
    before, after = (model(each).logits_BSV for each in (tokens, _windows(change=[(0, 0), (0, 3)])))
    torch.testing.assert_close(before[0, 4:10], after[0, 4:10], rtol=1e-12, atol=1e-12)
    assert (before - after)[0, :4].abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(before[0, 5:10].square().sum(), states[0])
    assert gradient[0, 5:10].abs().amax(-1).min() > 0
    assert (gradient[0, :5] == 0).all()
    assert (gradient[0, 10:] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_knows_the_documents_of_what_it_holds(make_model, variant):
    model, tokens = make_model(**VARIANTS[variant]), _windows()
    with torch.no_grad():
        expected = _alone(model, tokens)
        model.document_end = END
        for pieces in ([13], [1] * 13, [4, 1, 6, 2]):
            cache = KVCache(model.cfg, 2, torch.float64, tokens.device)
            parts = [model(part, cache=cache).logits_BSV for part in tokens.split(pieces, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("layers", "reach"), [([], 4), ([0], 12), ([1], 12)])
def test_a_token_reaches_as_far_as_the_windows_of_all_layers_together(make_model, layers, reach):
    """Two layers with windows of 3: two positions back, and from there two more. With one without, to the beginning."""
    model, states, tokens = make_model(window=3, window_layers=layers), [], _windows()
    model.embed.register_forward_hook(lambda module, inputs, output: states.append(output))
    logits = model(tokens).logits_BSV
    for s in range(13):
        (gradient,) = torch.autograd.grad(logits[0, s].square().sum(), states[0], retain_graph=True)
        reached = gradient[0].abs().amax(-1).nonzero().flatten().tolist()
        assert reached == list(range(max(0, s - reach), s + 1))


def test_packed_documents_are_one_causal_text_without_a_mask(make_model, monkeypatch):
    """What keeps the kernels, and every bit, that a model has had before there was another way."""
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention
    record = lambda *states, **how: calls.append((how["attn_mask"], how["is_causal"])) or attention(*states, **how)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    make_model()(_windows())
    assert calls == [(None, True)] * 2


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_norm_is_the_named_one(make_model, norm):
    model, x = make_model(norm=norm, norm_eps=1e-3), torch.randn(3, 12, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) * (norm == "layer")
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(model.norm(x), expected)


@pytest.mark.parametrize(
    ("every", "first_dense", "last_dense", "routed"),
    [
        (1, 0, 0, [0, 1, 2, 3, 4, 5]),
        (2, 0, 0, [1, 3, 5]),
        (3, 0, 0, [2, 5]),
        (1, 1, 0, [1, 2, 3, 4, 5]),
        (2, 2, 0, [3, 5]),
        (1, 5, 0, [5]),
        (1, 0, 2, [0, 1, 2, 3]),
        (2, 2, 1, [3]),
    ],
)
def test_routed_layers_are_where_the_pattern_says(make_model, tokens, every, first_dense, last_dense, routed):
    moe = MoEConfig(n_experts=4, k=2, d_expert=5, every=every, first_dense=first_dense, last_dense=last_dense)
    model = make_model(n_layers=6, moe=moe)
    assert [layer for layer, block in enumerate(model.blocks) if isinstance(block.mlp, MoELayer)] == routed
    dense = [block.mlp for block in model.blocks if isinstance(block.mlp, MLP)]
    assert len(dense) == 6 - len(routed)
    assert all(each.down.in_features == 20 for each in dense)
    assert len(model(tokens).routing) == len(routed)


@pytest.mark.parametrize(
    ("variant", "documents"),
    [("qwen3", "packed"), ("qwen3", "separate"), ("latent queries too", "packed"), ("gpt-oss", "packed")],
)
def test_the_whole_model_compiles_into_one_graph(make_model, tokens, variant, documents):
    model = make_model(n_layers=1, moe=MoEConfig(n_experts=5, k=3, d_expert=7, n_shared=1), **VARIANTS[variant])
    model.document_end = int(tokens[0, 4]) if documents == "separate" else None
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (tokens, tokens.flip(1), torch.zeros_like(tokens)):
            for module in (model, compiled):
                module.zero_grad()
                loss = _loss(module, batch)
                loss.backward()
                if module is model:
                    expected = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            torch.testing.assert_close([loss.detach(), *(p.grad for p in model.parameters())], expected)


def test_a_dense_model_has_no_routing(make_model, tokens):
    assert make_model(moe=None)(tokens).routing == []


def test_next_token_loss_is_the_mean_negative_log_probability_in_nats():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(probability, targets[..., None], -1)[..., 0])
    tensors = torch.from_numpy(logits), torch.from_numpy(targets)
    np.testing.assert_allclose(next_token_loss(*tensors), each.mean(), rtol=1e-12)
    np.testing.assert_allclose(next_token_loss(*tensors, reduction="none"), each, rtol=1e-12)
    assert next_token_loss(tensors[0].bfloat16(), tensors[1]).dtype == torch.float32


@pytest.mark.parametrize("moe", [True, False])
def test_a_few_steps_learn_a_fixed_batch(model_config, tokens, moe):
    model = _model(model_config(**({} if moe else {"moe": None}), init_std=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    first = _loss(model, tokens).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = _loss(model, tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 1.5
