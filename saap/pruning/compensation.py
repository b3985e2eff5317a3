"""What is given back for removed groups: the mean of what they wrote, as a bias (FLAP, arXiv 2312.11983 eq. 4–5)."""

import numpy as np
import torch
from torch import nn

from saap.models.groups import discover
from saap.scoring.statistics import Moments, Structure, output_matrices


@torch.no_grad()
def add_mean_bias(
    small: nn.Module, model: nn.Module, keep: np.ndarray, activations: dict[Structure, Moments]
) -> nn.Module:
    """Give the pruned model the mean output of what it lost: b += W[:, removed] · x̄[removed] at every output matrix.

    small: `prune(model, keep)`, changed in place and returned; activations: of `model`. So on inputs that never move,
    the pruned model equals the dense one. Families without biases there get them, and `config.output_bias` says so.
    """
    groups = discover(model)
    removed = {(layer, kind): np.flatnonzero(~keep[index]) for layer, kind, index in groups.structures()}
    pairs = zip(output_matrices(model), output_matrices(small), strict=True)
    for (layer, kind, part, dense), (*_, linear) in pairs:
        columns = (removed[layer, kind][:, None] * part.width + np.arange(part.width)).ravel()
        mean = torch.from_numpy(activations[layer, kind].mean[columns]).to(dense.weight.device)
        lost = dense.weight[:, torch.from_numpy(columns).to(dense.weight.device)].double() @ mean
        bias = lost if linear.bias is None else lost + linear.bias.double()
        if linear.bias is None:
            small.config.output_bias = True  # the families' uneven classes make room for it
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
    return small
