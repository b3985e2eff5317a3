"""saap_plus: the rise of the loss a parameter, the cheapest first. Ours; the pieces and their sources are named."""

import numpy as np
from torch import nn

from saap.groups import discover


def saap_plus(model: nn.Module, fisher: np.ndarray) -> np.ndarray:
    """F_g / parameters_g, with F_g = mean_d z_gd² the Fisher information of the group's mask (`saap.mask_fisher`).

    What it changes in SAAP (arXiv 2412.15127): the coarse importance and its fluctuation become one second moment
    over the samples, which is an estimate of the loss (Kwon et al., arXiv 2204.09656); it is divided by what the group
    costs, so that one order over all layers, heads and channels spends the budget where it hurts least. Nothing is
    standardised. It goes with `search = "global"` and `compensation = "least_squares"` (`saap.refit`).
    """
    return fisher / discover(model).parameters
