"""The settings of checks at the smallest size, for their tests."""

import torch

from experiments.suites.layer_checks import Settings
from experiments.suites.shapes import Shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(9, 16, 16, 4, 2)


def small_settings(device=CPU, **changes):
    """Two dtypes, one shape for all, and no run twice."""
    given = {
        "regular": SHAPE,
        "odd": SHAPE,
        "large": SHAPE,
        "dtypes": ("bf16", "fp32"),
        "reruns": 1,
        "interpreted": True,
    }
    return Settings(device, **given | changes)
