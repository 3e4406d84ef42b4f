"""The shape of a model: the transformer, and the routed experts of its layers."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated

from moe.config.parse import ANY, MANY, Between, OneOf
from moe.errors import BadInput


@dataclass
class MoEConfig:
    """The routed experts of one MoE layer."""

    n_experts: Annotated[int, Between(1, 1_000_000)] = 16  # E
    k: Annotated[int, Between(1, 1_000_000)] = 4  # K, experts per token
    d_expert: Annotated[int, Between(1, 100_000_000)] = 128  # F, hidden width of one expert
    n_shared: Annotated[int, Between(0, 1_000_000)] = 0  # experts that every token passes, each of width d_expert
    shared_gate: bool = False  # the shared experts' output times sigmoid(x w), one number per token (Qwen2-MoE)
    weigh_input: bool = False  # a row's weight multiplies what enters its expert, not what leaves it (Llama 4)
    # of the experts' products: same (train.precision) | fp8 (rows and weights are rounded to 8 bits with a scale for
    # every block, DeepSeek-V3, 2412.19437; gradients are those of train.precision's products)
    precision: Annotated[str, OneOf("same", "fp8")] = "same"
    # layer l of L has experts where (l + 1) % every == 0 and first_dense <= l < L - last_dense; the others are dense
    # MLPs of width d_ff
    every: Annotated[int, Between(1, 100_000)] = 1
    first_dense: Annotated[int, Between(0, 100_000)] = 0  # the first layer (from 0) that may have experts
    last_dense: Annotated[int, Between(0, 100_000)] = 0  # how many of the last layers have none
    widths: list[int] = field(default_factory=list)  # a hidden width per expert; empty: d_expert for all (2408.10681)
    n_experts_by_layer: list[int] = field(default_factory=list)  # E of each MoE layer; empty: n_experts for all
    k_by_layer: list[int] = field(default_factory=list)  # K of each MoE layer; empty: k for all
    # experts that cost nothing, numbered behind the real ones: they give 0, the token back, or a mix of the token and a
    # learned vector (MoE++, 2410.07348)
    n_null: Annotated[int, Between(0, 1_000_000)] = 0
    n_copy: Annotated[int, Between(0, 1_000_000)] = 0  # experts that give the token back
    n_constant: Annotated[int, Between(0, 1_000_000)] = 0  # experts that mix the token with a learned vector
    # share of a sequence's tokens that enter a block at all, where layer l has experts and (l + 1) % depth_every == 0;
    # elsewhere all do (Mixture-of-Depths, 2404.02258)
    depth: Annotated[float, Between(1e-09, 1)] = 1.0
    depth_every: Annotated[int, Between(1, 100_000)] = 2  # see depth
    # how a token decides alone in evaluation
    depth_causal: Annotated[str, OneOf("threshold", "predictor")] = "threshold"

    @property
    def n_cheap(self) -> int:
        """Null, copy and constant experts together."""
        return self.n_null + self.n_copy + self.n_constant

    def work(self) -> list[float]:
        """What a row costs at every expert, cheap ones behind: 1 at one of mean width, 0 at a cheap one."""
        widths = self.widths or [1] * self.n_experts
        return [width * len(widths) / sum(widths) for width in widths] + [0.0] * self.n_cheap


@dataclass
class RopeScaling:
    """How RoPE's frequencies are changed so that a model reads further than it was trained to (`moe.model.rope`)."""

    # none | linear (all divided by factor) | llama3 (the slow ones) | yarn (the slow ones; 2309.00071)
    type: Annotated[str, OneOf("none", "linear", "llama3", "yarn")] = "none"
    factor: Annotated[float, Between(1, ANY)] = 1.0  # what frequencies are divided by
    original_context: Annotated[int, Between(0, MANY)] = 0  # llama3, yarn: the context before it was stretched
    # llama3: frequencies that turn fewer times in it than low are divided, those that turn more than high are kept
    low_freq_factor: Annotated[float, Between(1e-09, ANY)] = 1.0
    high_freq_factor: Annotated[float, Between(1e-09, ANY)] = 4.0  # llama3: see low_freq_factor
    beta_fast: Annotated[float, Between(1e-09, ANY)] = 32.0  # yarn: those that turn more often in it are kept
    beta_slow: Annotated[float, Between(1e-09, ANY)] = 1.0  # yarn: those that turn less often are divided
    truncate: bool = True  # yarn: both ends of the range between are rounded to whole channels, outwards
    attention_factor: Annotated[float, Between(0, ANY)] = 0.0  # yarn: on cos and sin; 0: 1 + 0.1 ln(factor)


# Which of these settings mean something to which type.
_STRETCHED = ("type", "factor", "original_context")
ROPE_READS = {
    "none": ("type",),
    "linear": ("type", "factor"),
    "llama3": (*_STRETCHED, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_STRETCHED, "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


@dataclass
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): the keys and values of all heads are made from one short
    vector per token, and one key that positions turn is common to all heads."""

    kv_rank: Annotated[int, Between(1, 10_000_000)] = 512  # length of the vector that keys and values are made from
    q_rank: Annotated[int, Between(0, 10_000_000)] = 0  # the same for queries; 0: they are made from the state itself
    # channels of a head's query and key: those that positions do not turn, and those that they do
    nope_dim: Annotated[int, Between(1, 100_000)] = 128
    rope_dim: Annotated[int, Between(2, 100_000)] = 64  # see nope_dim
    v_dim: Annotated[int, Between(1, 100_000)] = 128  # channels of a head's value
    # rope_scaling.type=yarn: scores are multiplied by (1 + 0.1 · mscale · ln(factor))² (DeepSeek's mscale_all_dim)
    mscale: Annotated[float, Between(0, 1000)] = 0.0


@dataclass
class ModelConfig:
    """A decoder-only transformer. Zero means "derive it": n_kv_heads = n_heads, head_dim = d_model / n_heads, and
    vocab_size = the tokenizer's."""

    name: str = "cpu-small"  # what runs and tables call it
    vocab_size: Annotated[int, Between(0, MANY)] = 0  # V
    context: Annotated[int, Between(1, MANY)] = 256  # S, the longest sequence
    n_layers: Annotated[int, Between(1, 100_000)] = 4  # L
    d_model: Annotated[int, Between(1, 10_000_000)] = 256  # D
    n_heads: Annotated[int, Between(1, 100_000)] = 4  # H
    n_kv_heads: Annotated[int, Between(0, 100_000)] = 0  # heads of keys and values; 0: n_heads
    head_dim: Annotated[int, Between(0, 100_000)] = 0  # channels of a head; 0: d_model / n_heads
    d_ff: Annotated[int, Between(1, 100_000_000)] = 512  # width of a dense MLP
    # of every MLP and expert
    activation: Annotated[str, OneOf("swiglu", "gelu", "gelu_tanh", "relu2", "swiglu_clipped")] = "swiglu"
    # swiglu_clipped (gpt-oss): g · sigmoid(alpha g) · (u + 1), gate g cut off above the limit and u beyond ± it
    swiglu_alpha: Annotated[float, Between(-1e6, 1e6)] = 1.702
    swiglu_limit: Annotated[float, Between(0, 1e6)] = 7.0  # see swiglu_alpha; 0: none
    norm: Annotated[str, OneOf("rms", "layer")] = "rms"  # root mean square, or mean and variance
    norm_eps: Annotated[float, Between(0, 1)] = 1e-5  # added to the variance
    # before | after attention and MLP: of what they read, or of what they add to the stream (OLMo 2)
    norm_at: Annotated[str, OneOf("before", "after")] = "before"
    position: Annotated[str, OneOf("rope", "learned")] = "rope"  # rotary, or a learned vector per position
    rope_theta: Annotated[float, Between(1, ANY)] = 10000.0  # rope: base of the wavelengths
    rope_fraction: Annotated[float, Between(1e-09, 1)] = 1.0  # rope: of a head's channels, its first ones, that turn
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # none | head (one weight per head channel, Qwen3) | full (over all heads, OLMoE)
    qk_norm: Annotated[str, OneOf("none", "head", "full")] = "none"
    window: Annotated[int, Between(0, MANY)] = 0  # positions that a token attends to, its own included; 0: all
    window_layers: list[int] = field(default_factory=list)  # layers (from 0) with that window; empty: every layer
    latent: LatentConfig | None = None  # null: every head of keys and values has its own projection (grouped-query)
    sinks: bool = False  # a learned score per head that takes its part of the softmax and gives nothing (gpt-oss)
    expert_bias: bool = False  # biases in routed experts (gpt-oss)
    bias: bool = False  # biases on every linear map and norm (GPT-2)
    attn_bias: Annotated[str, OneOf("none", "qkv", "all")] = "none"  # biases of attention's maps; all where bias is
    embed_scale: Annotated[float, Between(1e-09, ANY)] = 1.0  # on what the embedding gives (Granite, muP)
    residual_scale: Annotated[float, Between(1e-09, ANY)] = 1.0  # on what attention and MLP add to the stream
    attn_scale: Annotated[float, Between(0, ANY)] = 0.0  # on the scores of attention; 0: 1 / sqrt(head_dim)
    logit_divisor: Annotated[float, Between(1e-09, ANY)] = 1.0  # of the logits
    tie_embeddings: bool = True  # the output map is the embedding
    init_std: Annotated[float, Between(0, 10)] = 0.02  # standard deviation of initial weights
    moe: MoEConfig | None = None  # null: a dense model


def entering(moe: MoEConfig, length: int) -> int:
    """How many tokens of a sequence of this length enter a block in training: depth · length, rounded up, at least 1.

    A share is taken for the decimal it was written as: 0.07 · 100 is 7, although the float product lies above 7."""
    return max(1, math.ceil(moe.depth * length * (1 - 1e-12)))


def head_dim(model: ModelConfig) -> int:
    """Channels of one attention head's queries and keys."""
    if model.latent is not None:
        return model.latent.nope_dim + model.latent.rope_dim
    return model.head_dim or model.d_model // model.n_heads


def rope_dim(model: ModelConfig) -> int:
    """How many of a head's channels turn with the position: its first ones, with latent attention its last."""
    return model.latent.rope_dim if model.latent is not None else int(head_dim(model) * model.rope_fraction)


def attn_bias(model: ModelConfig) -> str:
    """Which of attention's linear maps have biases: none, qkv or all."""
    return "all" if model.bias else model.attn_bias


def window_of(model: ModelConfig, layer: int) -> int:
    """How many positions a token attends to in this layer (from 0), its own included; 0: all before it."""
    return model.window if layer in (model.window_layers or (layer,)) else 0


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether layer `layer` (from 0) has routed experts."""
    moe = model.moe
    if moe is None:
        return False
    return moe.first_dense <= layer < model.n_layers - moe.last_dense and (layer + 1) % moe.every == 0


def moe_layers(model: ModelConfig) -> list[int]:
    """The layers (from 0) that have routed experts."""
    return [layer for layer in range(model.n_layers) if is_moe_layer(model, layer)]


def layer_moe(model: ModelConfig, layer: int) -> MoEConfig:
    """The routed experts of MoE layer `layer` (from 0, among all layers): its own E, K and depth."""
    assert model.moe is not None, "a dense model has no MoE layer"
    moe, position = model.moe, moe_layers(model).index(layer)
    return dataclasses.replace(
        moe,
        n_experts=moe.n_experts_by_layer[position] if moe.n_experts_by_layer else moe.n_experts,
        k=moe.k_by_layer[position] if moe.k_by_layer else moe.k,
        n_experts_by_layer=[],
        k_by_layer=[],
        depth=moe.depth if (layer + 1) % moe.depth_every == 0 else 1.0,
    )


def validate(model: ModelConfig) -> None:
    """Refuse shapes that do not fit together. Raises `BadInput`."""
    _validate_attention(model)
    _validate_rope(model)
    _validate_rope_scaling(model, model.rope_scaling)
    _validate_activation(model)
    if model.moe is not None:
        _validate_layers(model, model.moe)


def _validate_attention(model: ModelConfig) -> None:
    """Refuse heads that do not divide, biases given twice, and windows of layers that there are not."""
    if model.latent is not None:
        _validate_latent(model)
    elif not model.head_dim and model.d_model % model.n_heads:
        raise BadInput(
            f"model.d_model={model.d_model} is not divisible by model.n_heads={model.n_heads}: "
            "choose heads that divide it, or set model.head_dim."
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        raise BadInput(
            f"model.n_kv_heads={model.n_kv_heads} must divide model.n_heads={model.n_heads} (or be 0 for all of them)."
        )
    if model.bias and model.attn_bias != "none":
        raise BadInput(f"model.attn_bias={model.attn_bias} means nothing to model.bias=true, which gives all maps one.")
    layers = model.window_layers
    if layers and not model.window:
        raise BadInput(f"model.window_layers={layers} means nothing to model.window=0: set the window too.")
    if layers != sorted({*layers} & {*range(model.n_layers)}):
        raise BadInput(
            f"model.window_layers={layers} must be layers in rising order, from 0 to {model.n_layers - 1}, each once."
        )


def _validate_activation(model: ModelConfig) -> None:
    """Refuse constants of an activation that is another, and weights on an input beside what they do not multiply."""
    plain = ModelConfig()
    for name in ("swiglu_alpha", "swiglu_limit"):
        value, usual = getattr(model, name), getattr(plain, name)
        if value != usual and model.activation != "swiglu_clipped":
            raise BadInput(
                f"model.{name}={value} means nothing to model.activation={model.activation}: leave it {usual}."
            )
    if model.moe is not None and model.moe.weigh_input:
        if model.expert_bias:
            raise BadInput("model.moe.weigh_input=true takes experts without biases: set model.expert_bias=false.")
        if model.moe.n_cheap:
            raise BadInput(
                f"model.moe.weigh_input=true takes real experts alone; {model.moe.n_cheap} of them cost nothing "
                "(model.moe.n_null, n_copy, n_constant)."
            )


def _validate_rope(model: ModelConfig) -> None:
    """Refuse an odd number of channels that turn, and a fraction of learned positions."""
    if model.position != "rope":
        if model.rope_fraction != 1:
            raise BadInput(
                f"model.rope_fraction={model.rope_fraction} needs model.position=rope, not {model.position}."
            )
    elif model.latent is not None:
        if model.rope_fraction != 1:
            raise BadInput(f"model.rope_fraction={model.rope_fraction} means nothing to model.latent: leave it 1.")
        if model.latent.rope_dim % 2:
            raise BadInput(
                f"model.position=rope needs an even model.latent.rope_dim, and here it is {rope_dim(model)}."
            )
    elif head_dim(model) % 2:
        raise BadInput(f"model.position=rope needs an even head dimension, and here it is {head_dim(model)}.")
    elif rope_dim(model) % 2 or not rope_dim(model):
        raise BadInput(
            f"model.rope_fraction={model.rope_fraction} of a head dimension of {head_dim(model)} are {rope_dim(model)} "
            "channels: it must be an even number of at least 2."
        )


def _validate_rope_scaling(model: ModelConfig, scaling: RopeScaling) -> None:
    """Refuse settings that the type does not read, and a scaling of positions that are learned."""
    if scaling.type != "none" and model.position != "rope":
        raise BadInput(f"model.rope_scaling.type={scaling.type} needs model.position=rope, not {model.position}.")
    reads = ROPE_READS[scaling.type]
    for name, default in dataclasses.asdict(RopeScaling()).items():
        if name not in reads and (value := getattr(scaling, name)) != default:
            raise BadInput(
                f"model.rope_scaling.{name}={value} means nothing to model.rope_scaling.type={scaling.type}, which "
                f"reads {', '.join(reads[1:]) or 'no other setting'}."
            )
    if "original_context" in reads and not scaling.original_context:
        raise BadInput(
            f"model.rope_scaling.type={scaling.type} needs model.rope_scaling.original_context, the context that the "
            "model had before."
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if getattr(scaling, low) >= getattr(scaling, high):
            raise BadInput(
                f"model.rope_scaling.{low}={getattr(scaling, low)} must be below model.rope_scaling.{high}="
                f"{getattr(scaling, high)}."
            )


def _validate_latent(model: ModelConfig) -> None:
    """Refuse settings that latent attention does not read, or that are not read without others."""
    latent, kind = model.latent, model.rope_scaling.type
    if latent is not None and latent.mscale and kind != "yarn":
        raise BadInput(f"model.latent.mscale={latent.mscale} needs model.rope_scaling.type=yarn, and it is {kind}.")
    accepted: dict[str, tuple[object, ...]] = {"position": ("rope",), "qk_norm": ("none",), "bias": (False,)}
    accepted |= {"head_dim": (0,), "n_kv_heads": (0, model.n_heads), "attn_bias": ("none",), "attn_scale": (0.0,)}
    accepted |= {"sinks": (False,)}
    for name, values in accepted.items():
        value = getattr(model, name)
        if value not in values:
            choices = " or ".join(str(choice).lower() for choice in values)
            raise BadInput(f"model.{name}={value} has no meaning with model.latent: accepted is {choices}.")


def _validate_layers(model: ModelConfig, moe: MoEConfig) -> None:
    """Refuse an MoE without a layer of experts, and lists that do not have a number for each."""
    n_layers = len(moe_layers(model))
    if not n_layers:
        raise BadInput(
            f"model.moe.every={moe.every} with model.moe.first_dense={moe.first_dense} and model.moe.last_dense="
            f"{moe.last_dense} leaves no MoE layer among model.n_layers={model.n_layers}; for a dense model set "
            "model.moe=null."
        )
    for name, values in (("n_experts_by_layer", moe.n_experts_by_layer), ("k_by_layer", moe.k_by_layer)):
        if values and len(values) != n_layers:
            raise BadInput(f"model.moe.{name}={values} needs {n_layers} numbers, one for each MoE layer.")
        if any(value < 1 for value in values):
            raise BadInput(f"model.moe.{name}={values} has a number below 1.")
    if moe.depth < 1 and all(layer_moe(model, layer).depth == 1 for layer in moe_layers(model)):
        raise BadInput(
            f"model.moe.depth={moe.depth} with model.moe.depth_every={moe.depth_every} concerns none of the MoE layers "
            f"{moe_layers(model)} (from 0)."
        )
