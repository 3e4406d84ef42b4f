"""How big a model is, what it costs, and which dense model to compare it with: nothing here allocates a weight."""

import dataclasses
from typing import NamedTuple

import torch

from moe.config.balance import BalanceConfig, rows_vary
from moe.config.model import ModelConfig, MoEConfig, entering, head_dim, is_moe_layer, layer_moe, moe_layers
from moe.config.router import RouterConfig, facts, rows_per_token
from moe.errors import BadInput
from moe.model.experts import up_width
from moe.model.transformer import Transformer

TWIN_TOLERANCE = 0.01


class Size(NamedTuple):
    """Parameters: all of them, and those that take part in one token's forward pass. Tied weights count once."""

    total: int
    active: int


class Flops(NamedTuple):
    """Floating-point operations per token."""

    forward: int  # in training
    training: int  # forward and backward
    evaluation: int = 0  # a forward pass in evaluation; 0 in files that are older than this number


def size(cfg: ModelConfig, router: RouterConfig | None = None) -> Size:
    """Parameters of a model with this router (softmax by default), counted on the meta device. Active leaves out the
    E − K experts a token does not take, and counts a block as far as tokens enter it (Mixture-of-Depths)."""
    with torch.device("meta"):
        model = Transformer(cfg, router or RouterConfig())
    total = sum(p.numel() for p in model.parameters())
    if cfg.moe is None:
        return Size(total, total)
    idle = 0.0
    for layer in moe_layers(cfg):
        moe, block = layer_moe(cfg, layer), model.blocks[layer]
        biases = up_width(cfg, 1) * expert_width(moe) + cfg.d_model if cfg.expert_bias else 0
        unused = (moe.n_experts - _proper(moe.k, moe)) * (mlp_size(cfg, expert_width(moe)) + biases)
        inside = sum(p.numel() for name, p in block.named_parameters() if not name.startswith("depth."))
        idle += unused + (1 - moe.depth) * (inside - unused)
    return Size(total, total - round(idle))


def mlp_size(cfg: ModelConfig, width: float) -> float:
    """Weights of an MLP of this hidden width, biases left out."""
    return (up_width(cfg, 1) + 1) * width * cfg.d_model


def attention_matrices(cfg: ModelConfig) -> list[tuple[int, int]]:
    """Channels in and out of every projection of one attention layer. A latent's second half is as in training: keys
    and values are made from it (generation with a cache spares that, see `moe.model.latent`)."""
    d, heads, latent = cfg.d_model, cfg.n_heads, cfg.latent
    d_q = heads * head_dim(cfg)
    if latent is None:
        d_kv = (cfg.n_kv_heads or heads) * head_dim(cfg)
        return [(d, d_q), (d, d_kv), (d, d_kv), (d_q, d)]
    queries = [(d, latent.q_rank), (latent.q_rank, d_q)] if latent.q_rank else [(d, d_q)]
    keys = [(d, latent.kv_rank + latent.rope_dim), (latent.kv_rank, heads * (latent.nope_dim + latent.v_dim))]
    return [*queries, *keys, (heads * latent.v_dim, d)]


def expert_width(moe: MoEConfig) -> float:
    """F, on average where experts differ."""
    return sum(moe.widths) / len(moe.widths) if moe.widths else moe.d_expert


def _proper(rows: float, moe: MoEConfig) -> float:
    """Of so many rows those that go to experts proper, and not to null, copy and constant ones, when all are equally
    busy."""
    return rows * sum(moe.work()) / len(moe.work())


def flops(
    cfg: ModelConfig, router: RouterConfig | None = None, context: int = 0, *, rows: float | None = None
) -> Flops:
    """FLOPs per token at sequence length `context` (0: the model's own).

    2 per weight of every matmul that a token passes (router and vocabulary projection included, embeddings not), and
    2·S·H·(channels of a query + those of a value) per layer for attention scores and values, not halved for causality
    (PaLM, 2204.02311, appendix B) nor made less by data.documents=separate or a window, which mask what is computed.
    The gradients of a matmul cost twice as much, or as much where only one of its sides has one. What a backend adds
    to fill tiles is not counted, nor that expert choice rounds K·T/E up.

    rows: what experts computed per token of all, measured (`LayerMetrics.rows`), in every MoE layer. Without it, a
    router that takes as many experts as it likes counts as if it took K (`moe.config.balance.rows_vary`), and cheap
    experts as if all were equally busy. A soft router's experts compute its slots, and mixing tokens into
    slots and back counts like its scores. A block that only some tokens enter counts by their share, and its attention
    is over as many positions; in evaluation attention is computed for all and masked, and the share is about that."""
    router = router or RouterConfig()
    d, s = cfg.d_model, context or cfg.context
    projections = 2 * sum(n_in * n_out for n_in, n_out in attention_matrices(cfg))
    d_value = cfg.latent.v_dim if cfg.latent is not None else head_dim(cfg)
    scores = 2 * s * cfg.n_heads * (head_dim(cfg) + d_value)
    # What costs as much in both modes, with both gradients; then what evaluation, and what forward and backward add.
    common, evaluation, forward, backward = 2.0 * d * cfg.vocab_size, 0.0, 0.0, 0.0
    for layer in range(cfg.n_layers):
        if not is_moe_layer(cfg, layer):
            common += projections + scores + 2 * mlp_size(cfg, cfg.d_ff)
            continue
        moe = layer_moe(cfg, layer)
        share = entering(moe, s) / s if moe.depth < 1 else 1.0
        taken = share * _proper(rows_per_token(router, moe, cfg.context, s), moe) if rows is None else rows
        always = moe.n_shared * mlp_size(cfg, moe.d_expert) + d * (moe.shared_gate + 3 * moe.n_constant)
        common += 2 * taken * mlp_size(cfg, expert_width(moe)) + 2 * share * always
        evaluation += projections + scores
        forward += share * (projections + share * scores)
        backward += 2 * share * (projections + share * scores)
        routing = facts(router).flops(router, moe, d, cfg.context)
        evaluation, forward = evaluation + share * routing.evaluation, forward + share * routing.forward
        backward += share * routing.backward
        if share < 1:  # who enters: a score, and where a predictor stands in for it, one without gradient to the state
            predictor = moe.depth_causal == "predictor"
            evaluation, forward = evaluation + 2 * d * (1 + predictor), forward + 2 * d * (1 + predictor)
            backward += 2 * d * (2 + predictor)
    return Flops(round(common + forward), round(3 * common + forward + backward), round(common + evaluation))


def dense_twin(
    cfg: ModelConfig,
    match: str,
    router: RouterConfig | None = None,
    balance: BalanceConfig | None = None,
    rows: float | None = None,
) -> ModelConfig:
    """The dense model of the same depth and width whose feed-forward width meets `match` within 1%; router and balance
    are the MoE's, softmax by default, and `rows` the measured ones of `flops`.

    match: active_params (its parameters = the MoE's active ones), total_params, or flops (per token, forward). Each is
    linear in the width, so two measurements give it; a multiple of 8 is taken where one fits. Raises `BadInput` saying
    how close it can get when no width of at least 1 does, and for match=flops where only `rows` would say what the
    MoE costs."""
    if cfg.moe is None:
        raise BadInput(f"match={match} needs a Mixture-of-Experts model, and model={cfg.name} has model.moe=null.")
    # What is matched, and how a dense model measures up.
    match match:
        case "active_params":
            target, measure = size(cfg, router).active, lambda twin: size(twin).total
        case "total_params":
            target, measure = size(cfg, router).total, lambda twin: size(twin).total
        case "flops":
            layers = [layer_moe(cfg, layer) for layer in moe_layers(cfg)]
            unknown = [rows_vary(moe, router or RouterConfig(), balance or BalanceConfig()) for moe in layers]
            if any(unknown) and rows is None:
                raise BadInput(
                    f"match=flops of model={cfg.name} is not known in advance: with {max(unknown)} tokens take more "
                    "or fewer experts as training goes; choose match=active_params or total_params, or set rows to the "
                    "`rows` that the summary.json of a finished run of these settings has measured."
                )
            target, measure = flops(cfg, router, rows=rows).forward, lambda twin: flops(twin).forward
        case _:
            raise BadInput(f"match={match} is not one of active_params, flops, total_params.")

    def twin(width: int) -> ModelConfig:
        return dataclasses.replace(cfg, name=f"{cfg.name}-dense", moe=None, d_ff=width)

    # Linear in the width: the exact width lies on the line through two of them.
    at_one, slope = measure(twin(1)), measure(twin(2)) - measure(twin(1))
    exact = 1 + (target - at_one) / slope
    # The nearest whole width, a multiple of 8 before any other.
    for multiple in (8, 1):
        width = max(1, round(exact / multiple) * multiple)
        error = measure(twin(width)) / target - 1
        if abs(error) <= TWIN_TOLERANCE:
            return twin(width)
    raise BadInput(
        f"match={match}: no dense twin of model={cfg.name} comes within {TWIN_TOLERANCE:.0%} of {target:,}; "
        f"the nearest, model.d_ff={width}, is {error:+.1%} off: raise model.moe.k or model.moe.d_expert."
    )
