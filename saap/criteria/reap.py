"""REAP (Lasby et al., arXiv 2510.13999): ranks whole experts by the router's weights and the norms of their outputs."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import discover
from saap.scoring.experts import reap as router_weighted_norms


def reap(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Mean router weight · ‖output‖₂ over the tokens of each expert (`saap.scoring.experts.reap`).

    Published: the score, and a share of the experts of every layer (`search = "uniform"`). Our reading: one order over
    all layers under the plan's budget; channels of experts, of which it says nothing, have the norm of what they add to
    the output and go after every expert; heads and channels of layers without experts go last, in no order.
    """
    groups = discover(model)
    experts, channels = router_weighted_norms(model, tokens)
    last = [max(norm.max() for norm in of.values()) for of in (experts, channels)]
    score = np.full(len(groups), sum(last) + 2.0)
    for layer, (whole, inside) in groups.mixtures().items():
        score[whole], score[inside] = experts[layer], channels[layer] + last[0] + 1.0
    return score
