"""Loads as colours: blue below a fair share, near white at one, orange above, told apart by all eyes."""

from collections.abc import Sequence

import numpy as np

LOW, EVEN, HIGH = (0x21, 0x66, 0xAC), (0xF1, 0xF2, 0xF4), (0xD9, 0x73, 0x0D)
NOTHING = (0x9A, 0xA4, 0xB1)  # where a layer has no such expert
CLIP = 4.0  # ratios beyond it, and below one over it, have the strongest colours
WIDEST = 1024  # pixels of an image, unless it has more experts
LARGEST = 16  # pixels of a cell


def ratios(counts: Sequence[Sequence[int]]) -> np.ndarray:
    """c_i / fair by (MoE layer, expert), (L, E) float64: 1 is a fair share. 0 in a layer without rows, NaN beyond a
    layer's experts."""
    ratio_LE = np.full((len(counts), max(map(len, counts), default=0)), np.nan)
    for ratio_E, count_E in zip(ratio_LE, counts, strict=True):
        fair = sum(count_E) / max(1, len(count_E))
        ratio_E[: len(count_E)] = np.array(count_E) / fair if fair else 0.0
    return ratio_LE


def colours(ratio: np.ndarray) -> np.ndarray:
    """Red, green and blue of ratios, (...) -> (..., 3) uint8: by their logarithm, from `EVEN` at 1 to `LOW` and `HIGH`.
    NaN has a grey of its own."""
    power = np.log2(np.clip(np.nan_to_num(ratio, nan=1.0), 1 / CLIP, CLIP)) / np.log2(CLIP)
    end = np.where(power[..., None] < 0, LOW, HIGH)
    mixed = np.array(EVEN) + (end - EVEN) * np.abs(power)[..., None]
    return np.where(np.isnan(ratio)[..., None], NOTHING, mixed.round()).astype(np.uint8)


def image(counts: Sequence[Sequence[int]]) -> np.ndarray:
    """Layers by experts as a picture, (L·n, E·n, 3) uint8, with n² pixels for a cell."""
    colour_LE3 = colours(ratios(counts))
    size = max(1, min(LARGEST, WIDEST // max(1, colour_LE3.shape[1])))
    return colour_LE3.repeat(size, 0).repeat(size, 1)
