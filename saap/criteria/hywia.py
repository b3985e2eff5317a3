"""HyWIA (arXiv 2403.10799): coarse and fine importance, mixed for each group by attention weights."""

import numpy as np
from torch import nn

from saap.models.groups import discover


def hywia(model: nn.Module, score: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Softmax attention of each group over its own two scores: α = softmax(s), s = (ĉ, f̂), importance α·s.

    Published: the description (attention over normalised coarse and fine importances gives each group its own mix, in
    LLM-Pruner's frame, so the same share of every layer); not its code nor the normalisation. Our reading: ĉ and f̂ are
    the means over the samples of I^V and I^E, each divided by its mean over the layer and kind; the scores are both
    query and value, so the larger of the two weighs more and no parameter is trained.
    """
    scope = discover(model).scopes("layer_kind")
    size = np.bincount(scope)
    normalised = []
    for values in score:
        mean = values.mean(0, dtype=np.float64)
        scale = (np.bincount(scope, mean) / size)[scope]
        normalised.append(np.divide(mean, scale, out=np.zeros_like(mean), where=scale > 0))
    s = np.stack(normalised)
    weights = np.exp(s - s.max(0))
    return (weights * s).sum(0) / weights.sum(0)
