"""Wanda-sp: Wanda (Sun et al., arXiv 2306.11695) on structures, as FLAP (arXiv 2312.11983) compares with it."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import weight_of
from saap.scoring.statistics import Block, Moments, output_matrices


@torch.no_grad()
def wanda_sp(model: nn.Module, activations: dict[Block, Moments]) -> np.ndarray:
    """mean_i |W_ij| · ‖x_j‖₂ of column j of o_proj and down_proj, summed over the columns of a head.

    Published with the same share of every block (`search = "uniform"`). Our reading: with grouped queries a group is
    all columns of the query heads of a KV head; ‖x_j‖ goes over all calibration tokens.
    """
    scores = []
    for layer, kind, part, linear in output_matrices(model):
        column = weight_of(linear).float().abs().mean(0, dtype=torch.float64).cpu().numpy()
        scores.append((column * activations[layer, kind].norm).reshape(-1, part.width).sum(1))
    return np.concatenate(scores)
