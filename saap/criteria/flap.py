"""FLAP (An et al., arXiv 2312.11983): how much a channel fluctuates, weighted by what it is multiplied with."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import weight_of
from saap.scoring.statistics import Moments, Structure, output_matrices


@torch.no_grad()
def flap(model: nn.Module, activations: dict[Structure, Moments]) -> np.ndarray:
    """Var(x_j)·‖W_:,j‖² of column j of o_proj and down_proj (WIFV), z-scored per layer and kind, mean over a head.

    As its authors' code has it, the metric of o_proj is squared before it is standardised, which the paper's formula
    does not show: the few large columns then hold the rest below the mean, heads lie nearer to zero, and fewer of them
    go. The standard deviation is that of a sample.

    Published with one global order over heads and channels, each at its cost in parameters (AL-AM: `search =
    "global"`), and with the mean of what was removed added as a bias (`prune.compensation = "bias"`).
    Our reading: the variance is over all calibration tokens, where its code adds up samples around a moving mean and
    leaves out the first; with grouped queries a group is all columns of the query heads of a KV head.
    """
    scores = []
    for layer, kind, part, linear in output_matrices(model):
        square = weight_of(linear).float().square().sum(0, dtype=torch.float64).cpu().numpy()
        metric = activations[layer, kind].variance * square
        if kind == "attention":
            metric = metric**2
        spread = metric.std(ddof=1)
        z = (metric - metric.mean()) / (spread if spread > 0 else 1.0)
        scores.append(z.reshape(-1, part.width).mean(1))
    return np.concatenate(scores)
