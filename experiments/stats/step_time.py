"""What a training step, or a forward pass, takes on many GPUs: matmuls, all-to-alls, shards, the update; and memory.

A step is `micro` micro-batches of T tokens on every GPU. In each, every layer's dense weights are gathered over the
shard group and its experts' over the ranks that hold the same ones; tokens go to their experts and back, forward and
backward; experts take as long as those of the most loaded rank. Gradients are reduced over the same groups, and once a
step over the copies. Of each kind of communication a given fraction is hidden behind matmuls, as far as these last.

Not here: what a host takes to launch kernels, norms and other operations that memory paces, pipelines, stragglers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.stats.cluster import MachineConfig, all_reduce, gather, meshes
from experiments.stats.traffic import Traffic, exchange, row_bytes
from moe.config.model import ModelConfig, MoEConfig, head_dim, is_moe_layer, layer_moe, moe_layers
from moe.config.parallel import Layout
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.cost import attention_matrices, expert_width, flops, mlp_size, size

WEIGHT, GRADIENT, STATE = 2, 4, 16  # bytes: gathered in bf16, reduced in float32; weight, gradient and AdamW in float32
UPDATE = 28  # bytes that AdamW reads and writes of a parameter: 4 numbers read, 3 written


class Layer(NamedTuple):
    """A layer as the simulator sees it. FLOPs are of a forward pass."""

    dense: float  # FLOPs of a token: attention, router, shared experts or the dense MLP
    row: float  # FLOPs of a row of an expert; 0: the layer has none
    dense_weights: float
    expert: float  # weights of one expert
    n_experts: int


class Work(NamedTuple):
    """A model as the simulator sees it."""

    layers: list[Layer]
    d_model: int
    rest: float  # FLOPs of a token outside of layers: the vocabulary's projection
    rest_weights: float  # embeddings, norms, projections
    training: float  # FLOPs of a token by `moe.model.cost`, forward and backward
    vocab_size: int
    expert_hidden: float  # what a row of an expert leaves for the backward pass: channels in, and of its hidden layer


def work_of(cfg: ModelConfig, router: RouterConfig | None = None) -> Work:
    """A model whose vocabulary is known. FLOPs add up to those of `moe.model.cost.flops` but for what of a router's
    backward pass costs less than twice its forward pass."""
    router, layers = router or RouterConfig(), []
    channels = head_dim(cfg) + (cfg.latent.v_dim if cfg.latent is not None else head_dim(cfg))
    projections = sum(n_in * n_out for n_in, n_out in attention_matrices(cfg))
    attention = 2 * projections + 2 * cfg.context * cfg.n_heads * channels
    hidden = 0.0
    for layer in range(cfg.n_layers):
        if not is_moe_layer(cfg, layer):
            mlp = mlp_size(cfg, cfg.d_ff)
            layers.append(Layer(attention + 2 * mlp, 0.0, projections + mlp, 0.0, 0))
            continue
        moe = layer_moe(cfg, layer)
        always = moe.n_shared * mlp_size(cfg, moe.d_expert) + cfg.d_model * moe.n_experts
        expert, hidden = mlp_size(cfg, expert_width(moe)), cfg.d_model + 3 * expert_width(moe)
        layers.append(Layer(attention + 2 * always, 2 * expert, projections + always, expert, moe.n_experts))
    known = sum(layer.dense_weights + layer.expert * layer.n_experts for layer in layers)
    total = size(cfg, router).total
    vocabulary = 2.0 * cfg.d_model * cfg.vocab_size
    training = float(flops(cfg, router).training)
    return Work(layers, cfg.d_model, vocabulary, max(0.0, total - known), training, cfg.vocab_size, hidden)


def same_experts(model: ModelConfig) -> MoEConfig:
    """The experts of all MoE layers. Raises `BadInput` where layers differ, or experts are of several kinds."""
    first, *others = (layer_moe(model, layer) for layer in moe_layers(model))
    if first.depth < 1 or any((moe.n_experts, moe.k, moe.depth) != (first.n_experts, first.k, 1.0) for moe in others):
        raise BadInput(f"model={model.name} has layers with other numbers of experts, choices or tokens than others.")
    if first.n_cheap or first.widths:
        raise BadInput(f"model={model.name} has experts that cost nothing or of several widths: not simulated.")
    return first


@dataclass(frozen=True)
class Ask:
    """What a step is, and how it is computed."""

    tokens: int = 8192  # of one GPU in a micro-batch
    micro: int = 1  # micro-batches of a step
    matmul: str = "bf16"  # bf16 | fp8
    rows: str = "bf16"  # of tokens on their way to experts: bf16 | fp8; what comes back, and gradients, are bf16
    overlap_experts: float = 0.0  # the fraction of the all-to-alls that matmuls may hide
    overlap_shards: float = 0.9  # the same of gathering weights and reducing gradients
    recompute: bool = True  # every layer's forward pass once more in the backward pass


class Step(NamedTuple):
    """Seconds of a step on every GPU, and bytes."""

    dense: float  # attention and dense matmuls
    experts: float
    exchange: float  # all-to-alls, hidden or not
    shards: float  # weights gathered and gradients reduced, hidden or not
    hidden: float  # of both
    update: float
    seconds: float
    forward: float  # seconds of a forward pass of one micro-batch
    tflops: float  # of one GPU, in 1e12 per second: those of the model, recomputation left out
    memory: float
    imbalance: float  # rows of the most loaded rank over their mean, of all layers


def step(
    work: Work, machine: MachineConfig, parallel: Layout, moved: Sequence[Traffic], sampled: int, ask: Ask
) -> Step:
    """A step whose MoE layers move the traffic `moved`, in turn, of `sampled` tokens on every rank."""
    groups, share = meshes(machine, parallel), ask.tokens / sampled
    dense_rate, expert_rate = rates(machine, ask.matmul)
    to, back = row_bytes(work.d_model, ask.rows), row_bytes(work.d_model, "bf16")
    bf16 = row_bytes(work.d_model, "bf16")
    passes = 3 + ask.recompute  # a backward pass is two of a forward one

    # A micro-batch, layer by layer: seconds of a forward pass, and of all passes.
    dense = work.rest * ask.tokens / dense_rate
    experts = there = moves = gathered = reduced = 0.0
    worst, mean, place = 0.0, 0.0, 0
    for layer in work.layers:
        dense += layer.dense * ask.tokens / dense_rate
        weights, held = layer.dense_weights * WEIGHT, layer.expert * layer.n_experts / parallel.ep
        gathered += gather(machine, groups["shard"], weights)
        gathered += gather(machine, groups["expert_shard"], held * WEIGHT)
        reduced += gather(machine, groups["shard"], layer.dense_weights * GRADIENT)
        reduced += gather(machine, groups["expert_shard"], held * GRADIENT)
        if not layer.n_experts:
            continue
        scaled = moved[place % len(moved)].times(share)
        place += 1
        # Few rows are paced by reading the weights.
        experts += max(scaled.load_R.max() * layer.row / expert_rate, held * WEIGHT / machine.hbm)
        worst, mean = worst + scaled.load_R.max(), mean + scaled.load_R.mean()
        forward = exchange(machine, scaled, to) + exchange(machine, scaled, back)
        there += forward
        # Gradients go back as rows came, in bf16; a layer that is recomputed moves its rows again.
        moves += (1 + ask.recompute) * forward + 2 * exchange(machine, scaled, bf16)
    gathered += gather(machine, groups["shard"], work.rest_weights * WEIGHT)
    reduced += gather(machine, groups["shard"], work.rest_weights * GRADIENT)

    # A step: what matmuls hide is bounded by how long they last.
    n_weights = work.rest_weights + sum(layer.dense_weights + layer.expert * layer.n_experts for layer in work.layers)
    matmuls = ask.micro * passes * (dense + experts)
    exchanged = ask.micro * moves
    shards = ask.micro * (2 * gathered + reduced)
    shards += all_reduce(machine, groups["replicate"], n_weights * GRADIENT / parallel.shard)
    hidden = min(matmuls, ask.overlap_experts * exchanged + ask.overlap_shards * shards)
    update = n_weights / parallel.shard * UPDATE / machine.hbm
    seconds = matmuls + exchanged + shards - hidden + update
    ahead = dense + experts + there + gathered
    ahead -= min(dense + experts, ask.overlap_experts * there + ask.overlap_shards * gathered)
    return Step(
        dense=ask.micro * passes * dense,
        experts=ask.micro * passes * experts,
        exchange=exchanged,
        shards=shards,
        hidden=hidden,
        update=update,
        seconds=seconds,
        forward=ahead,
        tflops=work.training * ask.tokens * ask.micro / seconds / 1e12,
        memory=memory(work, parallel, ask, n_weights, worst / mean if mean else 1.0),
        imbalance=worst / mean if mean else 1.0,
    )


def rates(machine: MachineConfig, matmul: str) -> tuple[float, float]:
    """FLOPs per second of attention and dense matmuls, and of experts'."""
    if matmul == "fp8":
        return machine.peak_fp8 * machine.dense_fp8, machine.peak_fp8 * machine.experts_fp8
    return machine.peak_bf16 * machine.dense_bf16, machine.peak_bf16 * machine.experts_bf16


def memory(work: Work, parallel: Layout, ask: Ask, n_weights: float, imbalance: float) -> float:
    """Bytes of one GPU, by arithmetic: its part of weights, gradients and AdamW's state, one layer's weights gathered,
    the input of every layer in bf16 (and of every matmul, where nothing is recomputed), the rows of one layer's experts
    on the most loaded rank, and float32 logits with their gradient."""
    gathered = max(layer.dense_weights + layer.expert * layer.n_experts / parallel.ep for layer in work.layers)
    in_experts = work.training / 3 - work.rest - sum(layer.dense for layer in work.layers)
    k = in_experts / (sum(layer.row for layer in work.layers) or 1.0)
    one = ask.tokens * 2 * (8 * work.d_model + k * imbalance * work.expert_hidden)
    inputs = ask.tokens * 2 * work.d_model * len(work.layers) if ask.recompute else one * (len(work.layers) - 1)
    return n_weights * STATE / parallel.shard + gathered * WEIGHT + one + inputs + ask.tokens * work.vocab_size * 8
