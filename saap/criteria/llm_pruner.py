"""LLM-Pruner (Ma et al., arXiv 2305.11627): Taylor importance of coupled groups from summed gradients."""

import numpy as np
from torch import nn

from saap.errors import SaapError
from saap.scoring.statistics import TaylorSums

VARIANTS = ("vectorize", "param_first", "param_mix")


def llm_pruner(model: nn.Module, gradients: TaylorSums, variant: str = "param_first") -> np.ndarray:
    """Published: eq. 3–5, summed over the matrices of a group; the same share of every block (`search = "uniform"`).

    vectorize: |Σ W·ḡ| of a row or column ("vector"); param_first: Σ |W·ḡ| ("element¹", the default of its code);
    param_mix: Σ |W·ḡ − ½·W²·h| ("element²"). ḡ is the gradient of the mean loss of all samples, h the mean of the
    squared per-sample gradients. Our reading: with grouped queries a group is the KV head with all its query heads.
    """
    if variant not in VARIANTS:
        raise SaapError(f"variant must be one of {VARIANTS}")
    found: np.ndarray = getattr(gradients, variant)
    return found
