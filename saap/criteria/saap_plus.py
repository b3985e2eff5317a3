"""saap_plus: groups ranked by the rise of the loss per parameter, the lowest removed first. Our own criterion."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from saap.models.groups import discover
from saap.pruning.least_squares import refit
from saap.pruning.plan import PROTECTED, select
from saap.pruning.surgery import prune
from saap.scoring.fisher import mask_fisher


def saap_plus(
    model: nn.Module,
    fisher: np.ndarray,
    tokens: torch.Tensor,
    cuts: Sequence[float] = (),
    protect: Sequence[int] = PROTECTED,
    align: int = 32,
) -> np.ndarray:
    """F_g / parameters_g, with F_g = mean_d z_gd² the Fisher information of the group's mask (`saap.mask_fisher`).

    In SAAP's terms (arXiv 2412.15127), the coarse importance and its fluctuation become one second moment over the
    samples, which is an estimate of the loss (Kwon et al., arXiv 2204.09656). It is divided by the parameters of the
    group. So one order over all layers, heads and channels spends the budget where it hurts least. Nothing is
    standardised. It goes with `search = "global"` and `compensation = "least_squares"` (`saap.refit`).

    The worth of a group changes once others are gone. So at each of `cuts`, shares of the prunable parameters, the
    model is cut (`protect` and `align` as in `saap.select`) and refitted, and what is left is ranked again. Groups that
    an earlier cut removed stay first in the order. With cuts the score is the place in the order: whole numbers from 0.
    """
    groups = discover(model)
    score = fisher / groups.costs
    for cut in sorted(cuts):
        keep = select(score, groups, cut, protect=tuple(protect), align=align)
        small = refit(prune(model, keep), model, keep, tokens)
        again = np.full(len(groups), -1.0)  # below all that stays
        again[keep] = mask_fisher(small, tokens) / discover(small).costs
        score[np.lexsort((score, again))] = np.arange(len(groups))
    return score
