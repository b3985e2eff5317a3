"""Random order: the floor of every comparison."""

import numpy as np
from torch import nn

from saap.models.groups import discover


def random(model: nn.Module, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) from the seed; the same share of every layer."""
    return np.random.default_rng(seed).random(len(discover(model)))
