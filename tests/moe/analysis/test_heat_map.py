"""Claims about loads as colours."""

import numpy as np
import pytest
import torch

from moe.analysis.heat_map import EVEN, HIGH, LARGEST, LOW, NOTHING, WIDEST, colours, image, ratios
from moe.analysis.metrics import load_ratio


def test_ratios_are_load_ratios_padded_to_the_widest_layer():
    counts = [[3, 0, 9], [5, 5], [0, 0, 0]]
    ratio_LE = ratios(counts)
    for ratio_E, count_E in zip(ratio_LE, counts, strict=True):
        assert ratio_E[: len(count_E)] == pytest.approx(load_ratio(torch.tensor(count_E)).numpy())
    assert np.isnan(ratio_LE).tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert ratios([]).shape == (0, 0)


def test_a_colour_has_the_side_and_the_size_of_a_ratios_logarithm():
    shown = colours(np.array([1.0, 0.25, 0.0, 4.0, 400.0, np.nan]))
    assert shown.tolist() == [list(colour) for colour in (EVEN, LOW, LOW, HIGH, HIGH, NOTHING)]
    # Half of a fair share is half the way, and so is twice of it.
    half, twice = colours(np.array([0.5, 2.0])).astype(float)
    assert half == pytest.approx((np.array(EVEN) + LOW) / 2, abs=0.51)
    assert twice == pytest.approx((np.array(EVEN) + HIGH) / 2, abs=0.51)


@pytest.mark.parametrize("n_experts", [3, 100, 2000])
def test_an_image_has_a_square_for_every_cell(n_experts):
    counts = np.random.default_rng(0).integers(0, 50, (4, n_experts))
    shown = image(counts.tolist())
    size = shown.shape[0] // 4
    assert shown.dtype == np.uint8
    assert shown.shape == (4 * size, n_experts * size, 3)
    assert 1 <= size <= LARGEST
    assert shown.shape[1] <= max(WIDEST, n_experts)
    expected = colours(counts / counts.mean(1, keepdims=True))
    for y, x in ((0, 0), (size - 1, size - 1), (2 * size, shown.shape[1] - 1)):
        assert shown[y, x].tolist() == expected[y // size, x // size].tolist()
