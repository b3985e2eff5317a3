"""LLM-Pruner (Ma et al., arXiv 2305.11627): Taylor importance of coupled groups from summed gradients."""

import numpy as np
from torch import nn

from saap.errors import SaapError
from saap.scoring.statistics import TaylorSums

VARIANTS = ("vectorize", "param_first", "param_mix")
QUERY_HEADS = ("as_coded", "served")


def llm_pruner(
    model: nn.Module, gradients: TaylorSums, variant: str = "param_first", query_heads: str = "as_coded"
) -> np.ndarray:
    """Published: eq. 3–5, summed over the matrices of a group; the same share of every layer, heads rounded down.

    vectorize: |Σ W·ḡ| of a row or column ("vector"); param_first: Σ |W·ḡ| ("element¹", the default of its code);
    param_mix: Σ |W·ḡ − ½·W²·h| ("element²"). ḡ is the gradient of the mean loss of all samples, h the mean of the
    squared per-sample gradients.

    With grouped queries its code removes a KV head and the query heads it serves, as we do, but in the score of KV
    head h it counts the query heads h, h + H_kv, h + 2·H_kv, … (`TaylorSums`): a mistake, kept as "as_coded" because
    it is how the method runs. query_heads = "served" counts the heads that go. Its search is "uniform_down", with one
    difference: where no head goes its code stops with an error.
    """
    if variant not in VARIANTS or query_heads not in QUERY_HEADS:
        raise SaapError(f"variant must be one of {VARIANTS}, query_heads one of {QUERY_HEADS}")
    found: np.ndarray = getattr(gradients, variant if query_heads == "served" else f"{variant}_as_coded")
    return found
