"""GISP (Wang et al., arXiv 2510.18030): first-order importance, normalised per layer, removed in many small steps."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.groups import discover
from saap.models.offload import is_offloaded
from saap.pruning.plan import PROTECTED, select
from saap.pruning.surgery import prune
from saap.scoring.fisher import mask_gradient

STEP = 0.01  # share of the prunable parameters that goes between two backward passes


def gisp(
    model: nn.Module, tokens: torch.Tensor, ratio: float, protect: Sequence[int] = PROTECTED, kinds: str = "pooled"
) -> np.ndarray:
    """|Σ W·g| of a structure, divided by the mean of its layer and kind; after each step what is left is ranked again.

    Published: the first-order score over a structure's weights, its normalisation per layer, one global order, many
    small steps without anything trained between them, and so models nested in each other. Our reading: the sum is that
    over the structure's columns of o_proj or down_proj, which is the gradient of its mask; the layer's mean is the
    unit; a step is a hundredth of the prunable parameters, each group at its cost.

    The score is the place in the order in which groups went: whole numbers from 0. Those that stay to the end come
    after, by their last score. It goes with `search = "global"`.

    Args:
        tokens: int64 (D, T), the calibration text: one backward pass over it a step.
        ratio: share of the prunable parameters at which the order ends.
        protect, kinds: as in `saap.select`.

    Raises:
        SaapError: a ratio out of reach, a value that is not finite, or weights away from their device.
    """
    if is_offloaded(model):
        raise SaapError("gisp prunes as it goes, and needs a model whose weights are all on its device")
    groups = discover(model)
    importance = _normalised(mask_gradient(model, tokens), groups.scopes("layer_kind"))
    score = importance
    steps = max(1, round(ratio / STEP))
    for step in range(1, steps):
        # small steps are less than a step of channels a layer: rounding to whole ones is left to the plan
        keep = select(score, groups, ratio * step / steps, kinds=kinds, protect=tuple(protect), align=1)
        small = prune(model, keep)
        again = np.full(len(groups), -1.0)  # below all that stays
        again[keep] = _normalised(mask_gradient(small, tokens), groups.scopes("layer_kind")[keep])
        placed = np.empty(len(groups))
        placed[np.lexsort((score, again))] = np.arange(len(groups))
        score = placed
    return score


def _normalised(gradient: np.ndarray, scope: np.ndarray) -> np.ndarray:
    scope = np.unique(scope, return_inverse=True)[1]
    importance = np.abs(gradient)
    mean = (np.bincount(scope, importance) / np.bincount(scope))[scope]
    return np.divide(importance, mean, out=np.zeros_like(importance), where=mean > 0)
