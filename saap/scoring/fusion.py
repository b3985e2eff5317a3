"""Adaptive importance fusion (SAAP eq. 4–9)."""

from collections.abc import Callable

import numpy as np

from saap.errors import SaapError
from saap.models.groups import Groups

FUSIONS = ("adaptive", "weighted", "vector", "element")
LAMBDA_SCOPES = ("kind", "layer_kind", "global", "group")


def fuse(
    vector: np.ndarray,
    element: np.ndarray,
    groups: Groups,
    *,
    fusion: str = "adaptive",
    lambda_scope: str = "kind",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One importance per sample and group from the coarse and the fine one.

    adaptive: I = I^V/(2λ₁²) + I^E/(2λ₂²) + log(λ₁λ₂). The paper leaves open how the λ are found; as homoscedastic
    uncertainties they minimise the summed objective, which gives λ₁² = mean I^V, λ₂² = mean I^E over the scope.
    weighted: ½·I^V + ½·I^E. vector, element: one of the two alone (the paper's "separate").

    Args:
        vector, element: float (D, N) importances, ≥ 0.
        lambda_scope: over which groups (and always all samples) the means go: 'kind', 'layer_kind', 'global', 'group'.

    Returns:
        fused float64 (D, N); λ₁ and λ₂, each float64 (N,), 1 where unused.

    Raises:
        SaapError: an unknown switch; a scope in which an importance is zero throughout, so that no λ exists.
    """
    if fusion not in FUSIONS or lambda_scope not in LAMBDA_SCOPES:
        raise SaapError(f"fusion must be one of {FUSIONS} and lambda_scope one of {LAMBDA_SCOPES}")
    ones = np.ones(len(groups))
    if fusion == "vector":
        return vector.astype(np.float64), ones, ones
    if fusion == "element":
        return element.astype(np.float64), ones, ones
    if fusion == "weighted":
        return _per_sample(lambda v, e: 0.5 * v + 0.5 * e, vector, element), ones, ones
    scope = groups.scopes(lambda_scope)
    size = np.bincount(scope)
    square1 = (np.bincount(scope, sample_mean(vector)) / size)[scope]
    square2 = (np.bincount(scope, sample_mean(element)) / size)[scope]
    if not square1.any() or not square2.any():
        raise SaapError("all importances are zero: the model, or the text it is calibrated on, is degenerate")
    if not (square1 > 0).all() or not (square2 > 0).all():
        dead = int(np.flatnonzero((square1 <= 0) | (square2 <= 0))[0])
        raise SaapError(
            f"layer {groups.layer[dead]}, {groups.kind[dead]} {groups.unit[dead]} has zero importance in its whole "
            f"{lambda_scope} scope: use a wider lambda_scope"
        )
    twice1, twice2, log = 2 * square1, 2 * square2, 0.5 * np.log(square1 * square2)
    fused = _per_sample(lambda v, e: v / twice1 + e / twice2 + log, vector, element)
    return fused, np.sqrt(square1), np.sqrt(square2)


def sample_mean(values: np.ndarray) -> np.ndarray:
    """float64 (N,): the mean of (D, N) over the samples, added in float64 one by one, without a copy of it all."""
    total = np.zeros(values.shape[1])
    for sample in values:
        total += sample
    return total / len(values)


def _per_sample(combine: Callable[..., np.ndarray], vector: np.ndarray, element: np.ndarray) -> np.ndarray:
    """float64 (D, N). All samples at once would need four more arrays of that size."""
    found = np.empty(vector.shape)
    for row, v, e in zip(found, vector, element, strict=True):
        row[:] = combine(v.astype(np.float64), e.astype(np.float64))
    return found
