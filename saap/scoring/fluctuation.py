"""Fluctuation of importance over the calibration samples, and the adaptive stability indicator (SAAP eq. 10–11)."""

import numpy as np

from saap.errors import SaapError
from saap.models.groups import Groups
from saap.scoring.fusion import sample_mean

FLUCTUATIONS = ("var_weight", "var", "cv", "mean")
ASI_SCOPES = ("layer_kind", "kind", "global")


def fluctuation(fused: np.ndarray, weight_norm_sq: np.ndarray, *, fluctuation: str = "var_weight") -> np.ndarray:
    """float64 (N,) from fused (D ≥ 2, N): how much each group's importance moves between samples.

    var_weight: M = 1/(D−1)·Σ_d (I_d − mean I)²·‖W‖² (eq. 10); var: without ‖W‖²; cv: standard deviation over |mean|;
    mean: the mean importance itself, no fluctuation (the ablation without ASI).
    """
    if fluctuation not in FLUCTUATIONS:
        raise SaapError(f"fluctuation must be one of {FLUCTUATIONS}")
    if len(fused) < 2 and fluctuation != "mean":
        raise SaapError("the fluctuation needs at least two calibration samples: raise calibrate.count")
    if fluctuation == "mean":
        return sample_mean(fused)
    mean, total = sample_mean(fused), np.zeros(fused.shape[1])
    for sample in fused:  # one by one: a 70B's are a gigabyte
        total += (sample - mean) ** 2
    variance = total / (len(fused) - 1)
    if fluctuation == "var":
        return variance
    if fluctuation == "cv":
        mean = np.abs(mean)
        return np.divide(np.sqrt(variance), mean, out=np.zeros_like(mean), where=mean > 0)
    return variance * weight_norm_sq


def asi(fluctuation: np.ndarray, groups: Groups, *, asi_scope: str = "layer_kind") -> np.ndarray:
    """float64 (N,): (M − mean M)/std M over each scope (eq. 11; population standard deviation; 0 where it is 0)."""
    if asi_scope not in ASI_SCOPES:
        raise SaapError(f"asi_scope must be one of {ASI_SCOPES}")
    scope = groups.scopes(asi_scope)
    size = np.bincount(scope)
    centred = fluctuation - (np.bincount(scope, fluctuation) / size)[scope]
    std = np.sqrt(np.bincount(scope, centred**2) / size)[scope]
    # the mean of equal numbers can miss them by a bit, which would then count as one standard deviation
    low, high = np.full(len(size), np.inf), np.full(len(size), -np.inf)
    np.minimum.at(low, scope, fluctuation)
    np.maximum.at(high, scope, fluctuation)
    return np.divide(centred, std, out=np.zeros_like(centred), where=(high > low)[scope] & (std > 0))
