"""Magnitude: what needs no data at all."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import layer_parts, weight_of


@torch.no_grad()
def magnitude(model: nn.Module) -> np.ndarray:
    """Mean |w| over all weights of the group: a mean, so that heads and channels share a scale.

    The l1 norm of LLM-Pruner's comparisons, divided by the size of the group; same share of every layer.
    """
    scores = []
    for kinds in layer_parts(model):
        for kind in kinds:
            total, size = np.zeros(1), 0
            for part, linear in kinds[kind]:
                rows = weight_of(linear).float().abs().sum(1 - part.axis, dtype=torch.float64)
                total = total + part.by_unit(rows).sum(1).cpu().numpy()
                size += part.width * linear.weight.shape[1 - part.axis]
            scores.append(total / size)
    return np.concatenate(scores)
