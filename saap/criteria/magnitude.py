"""Magnitude: what needs no data at all."""

from typing import Any

import numpy as np
import torch
from torch import nn

from saap.errors import not_finite
from saap.models.families import Experts, family_of
from saap.models.groups import layer_parts, weight_of


@torch.no_grad()
def magnitude(model: nn.Module) -> np.ndarray:
    """Mean |w| over all weights of the group: a mean, so that heads and channels share a scale.

    The l1 norm of LLM-Pruner's comparisons, divided by the size of the group; same share of every layer. An expert has
    the weights of its channels and its row of the router. Raises SaapError for a weight that is not finite.
    """
    scores = []
    family = family_of(model.config)
    mixtures = family.mixtures(model) if isinstance(family, Experts) else {}
    for layer, kinds in enumerate(layer_parts(model)):
        for kind in kinds:
            total, size = np.zeros(1), 0
            for part, linear in kinds[kind]:
                rows = weight_of(linear).float().abs().sum(1 - part.axis, dtype=torch.float64)
                total = total + part.by_unit(rows).sum(1).cpu().numpy()
                size += part.width * linear.weight.shape[1 - part.axis]
            scores.append(total / size)
        if layer in mixtures:
            module: Any = family.layers(model)[layer]
            rows, channels = (t.cpu().numpy() for t in family.by_expert(module, torch.abs))  # type: ignore[attr-defined]
            width, hidden = channels.shape[1], module.mlp.experts.down_proj[0].numel() // channels.shape[1]
            scores += [(rows + channels.sum(1)) / (hidden * (3 * width + 1)), channels.ravel() / (3 * hidden)]
    found = np.concatenate(scores)
    if not np.isfinite(found).all():
        raise not_finite("a score", model)
    return found
