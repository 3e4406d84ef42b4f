"""Rotary positions (RoFormer, 2104.09864), and what stretches them to longer contexts.

Letters beyond the glossary: d channels of a head that turn (cos and sin have one entry for two of them).
"""

import math

import torch
from torch import Tensor

from moe.config.model import ModelConfig, RopeScaling, rope_dim


def rotary(cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each (context, d / 2) float32, of the angles position · frequency, times the attention factor."""
    frequency_d, attention_factor = frequencies(cfg)
    angle_Sd = torch.outer(torch.arange(cfg.context).float(), frequency_d)
    cos_Sd, sin_Sd = angle_Sd.cos(), angle_Sd.sin()
    if attention_factor != 1:
        cos_Sd, sin_Sd = cos_Sd * attention_factor, sin_Sd * attention_factor
    return cos_Sd, sin_Sd


def frequencies(cfg: ModelConfig) -> tuple[Tensor, float]:
    """The frequency of every pair of channels, (d / 2,) float32, in radians per position, and the attention factor:
    theta^(−2i/d), changed by `cfg.rope_scaling`, and 1 unless that is yarn.

    1 / theta^(2i/d), rounded as transformers rounds it: in the last bit another form of it turns far positions by
    another angle. So are the changes of it."""
    scaling, dim = cfg.rope_scaling, rope_dim(cfg)
    power_d = cfg.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
    match scaling.type:
        case "linear":  # positions lie closer
            return 1.0 / power_d / scaling.factor, 1.0
        case "llama3":
            return _llama3(1.0 / power_d, scaling), 1.0
        case "yarn":
            factor = scaling.attention_factor or 1.0 + 0.1 * math.log(scaling.factor)
            return _yarn(power_d, scaling, cfg.rope_theta, dim), factor
        case _:
            return 1.0 / power_d, 1.0


def _llama3(frequency_d: Tensor, scaling: RopeScaling) -> Tensor:
    """Divided by the factor where it turns fewer than `low_freq_factor` times in the original context, kept where it
    turns more than `high_freq_factor` times, and mixed between (Llama 3.1, 2407.21783, and its reference code)."""
    wavelength_d, low, high = 2 * math.pi / frequency_d, scaling.low_freq_factor, scaling.high_freq_factor
    kept_d = (scaling.original_context / wavelength_d - low) / (high - low)  # the share that is kept
    mixed_d = (1 - kept_d) * frequency_d / scaling.factor + kept_d * frequency_d
    slow_d = wavelength_d > scaling.original_context / low
    fast_d = wavelength_d < scaling.original_context / high
    return torch.where(slow_d, frequency_d / scaling.factor, torch.where(fast_d, frequency_d, mixed_d))


def _yarn(power_d: Tensor, scaling: RopeScaling, theta: float, dim: int) -> Tensor:
    """1 / power kept where it turns more than `beta_fast` times in the original context, divided by the factor where it
    turns fewer than `beta_slow` times, and mixed between, linearly in the number of the pair (YaRN, 2309.00071)."""

    def pair(turns: float) -> float:
        """The pair of channels that turns so many times in the original context."""
        return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step
    ramp_d = ((torch.arange(dim // 2).float() - first) / (last - first)).clamp(0, 1)
    kept_d = 1 - ramp_d
    return 1.0 / (scaling.factor * power_d) * (1 - kept_d) + 1.0 / power_d * kept_d


def rotate(x_BHS: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2), Llama's layout: (B, H, S, channels) -> the same, same dtype. Channels beyond
    the first d stay as they are."""
    dim = 2 * cos_Sd.shape[-1]
    (a, b), kept = x_BHS[..., :dim].chunk(2, dim=-1), x_BHS[..., dim:]
    parts = (a * cos_Sd - b * sin_Sd, b * cos_Sd + a * sin_Sd)
    return torch.cat((*parts, kept) if kept.shape[-1] else parts, dim=-1).to(x_BHS.dtype)
