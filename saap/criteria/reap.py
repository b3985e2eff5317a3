"""REAP (Lasby et al., arXiv 2510.13999): ranks whole experts by the router's weights and the norms of their outputs."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import discover
from saap.scoring.experts import reap as router_weighted_norms


def reap(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Mean router weight · ‖output‖₂ over the tokens of each expert (`saap.scoring.experts.reap`).

    Published: the score, and a share of the experts of every layer. Our reading: one order over all layers under the
    plan's budget; heads and channels, of which it says nothing, go after every expert.
    """
    groups = discover(model)
    norms = np.concatenate(router_weighted_norms(model, tokens))
    score = np.full(len(groups), norms.max() + 1.0)
    score[groups.kind == "expert"] = norms
    return score
