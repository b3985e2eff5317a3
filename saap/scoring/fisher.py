"""The Fisher information of coupled groups' masks: what removing a group costs, in units of the loss."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from saap.errors import not_finite
from saap.models.families import Experts, family_of
from saap.models.groups import weight_of
from saap.scoring.backward import see_gradients
from saap.scoring.experts import expert_masks
from saap.scoring.statistics import output_matrices


def mask_fisher(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> np.ndarray:
    """float64 (N,): F_g = mean_d z_gd², z_gd what group g gives to the loss of sample d, to first order.

    A mask m_g on what the group writes, the columns of its output matrix (o_proj, down_proj and their likes), has the
    gradient z_gd = Σ_t Σ_{j in g} x_tj (Wᵀδ_t)_j: x the matrix' input, δ the gradient of the sample's mean next-token
    loss at its output. ½F_g is the second-order rise of the loss when m_g goes from 1 to 0, up to a factor all groups
    share, with the empirical Fisher for the Hessian and cross terms left out (Kwon et al., arXiv 2204.09656).

    F_g = (mean z)² + var z: SAAP's coarse importance with its sign, and its fluctuation over the samples, in one unit.
    It is comparable between layers and between heads and channels, which a z-score is not.

    Args:
        tokens: int64 (D, T), T ≥ 2. Memory is weights and activations: no gradient of a weight is made.
        batch_size: sequences at once. Changes speed and memory, not the result.

    Raises:
        SaapError: unknown family, or a value that is not finite.
    """
    return _mean_over_samples(model, tokens, batch_size, torch.square, "Fisher information")


def mask_gradient(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> np.ndarray:
    """float64 (N,): mean_d z_gd, the gradient of the mean loss for the mask of each group (as in `mask_fisher`)."""
    return _mean_over_samples(model, tokens, batch_size, lambda z: z, "gradient of masks")


def _mean_over_samples(
    model: nn.Module,
    tokens: torch.Tensor,
    batch_size: int,
    of: Callable[[torch.Tensor], torch.Tensor],
    name: str,
) -> np.ndarray:
    """float64 (N,): mean_d of(z_gd)."""
    if isinstance(family_of(model.config), Experts):
        return expert_masks(model, tokens, batch_size, of, name)
    matrices = list(output_matrices(model))
    sums = [torch.zeros(linear.in_features // part.width, dtype=torch.float64) for *_, part, linear in matrices]

    def see(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        _, _, part, linear = matrices[index]
        z = (
            (x.float() * (delta @ weight_of(linear, delta.device).to(delta.dtype)).float())
            .unflatten(-1, (-1, part.width))
            .sum((1, -1))
        )
        sums[index] += of(z).sum(0).double().cpu()

    see_gradients(model, tokens, [linear for *_, linear in matrices], see, batch_size=batch_size, name=name)
    for (layer, kind, _, _), total in zip(matrices, sums, strict=True):
        if not torch.isfinite(total).all():
            raise not_finite(f"the {name} of layer {layer} ({kind})", model)
    return (torch.cat(sums) / len(tokens)).numpy()
