"""LoRAPrune (Zhang et al., arXiv 2305.18403): importance from the gradients of LoRA factors while they are trained."""

import numpy as np
import torch
from torch import nn

from saap.errors import not_finite
from saap.models.groups import discover

from .factors import ALPHA, RANK, Factor, lora_factors, training_steps

DECAY = 0.9


def loraprune(model: nn.Module, tokens: torch.Tensor, seed: int) -> np.ndarray:
    """|(∂B·A + B·∂A − ∂B·∂A) ⊙ (W + s·B·A)| summed over a group, as a moving average over training steps.

    Published: the estimate of the weight's gradient (eq. 9), the sum over dependent weights, the moving average (0.9),
    and the same share of every layer. Our reading: groups are L2-normalised within their layer and kind at each step;
    the factors (rank 8) see the calibration text twice (`factors.py`); and nothing is masked meanwhile, where its
    authors prune little by little over a long fine-tuning: recovery comes after pruning here, as for every criterion.
    """
    structures = list(discover(model).structures())
    average = {(layer, kind): torch.zeros(len(index), dtype=torch.float64) for layer, kind, index in structures}
    with lora_factors(model, seed) as factors:
        for _ in training_steps(model, factors, tokens, seed, "loraprune"):
            step = {structure: torch.zeros_like(total) for structure, total in average.items()}
            for factor in factors:
                step[factor.layer, factor.kind] += _importance(factor).cpu()
            for structure, total in average.items():
                norm = step[structure].norm()
                if not torch.isfinite(norm):
                    layer, kind = structure
                    raise not_finite(f"the gradient of layer {layer} ({kind})", model)
                total.mul_(DECAY).add_(step[structure] / norm.clamp(min=1e-300), alpha=1 - DECAY)
    return np.concatenate([average[layer, kind].numpy() for layer, kind, _ in structures])


@torch.no_grad()
def _importance(factor: Factor) -> torch.Tensor:
    """Of each unit, float64 (units,), in this factor's matrix."""
    a, b = factor.a, factor.b
    assert a.grad is not None
    assert b.grad is not None
    gradient = b.grad @ a + (b - b.grad) @ a.grad
    weight = torch.addmm(factor.linear.weight.float(), b, a, alpha=ALPHA / RANK)
    return factor.part.by_unit((gradient * weight).abs().sum(1 - factor.part.axis).double()).sum(1)
