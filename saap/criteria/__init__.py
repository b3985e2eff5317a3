"""The criteria that rank coupled groups, beside SAAP's own chain (score → fuse → fluctuation).

A criterion is a function

    criterion(model, **statistics, **options) -> float64 (N,)

It returns one number for each of the N groups, in the order of `discover(model)`; the lowest are removed first. Its
arguments name what it needs. A pipeline computes each statistic once and caches it:

    score        (vector, element), float32 (D, N): the per-sample importances of `saap.score`
    gradients    TaylorSums (saap/scoring/statistics.py): sums over summed gradients
    activations  {(layer, kind): Moments} of the inputs of o_proj and down_proj
    fisher       float64 (N,): `saap.mask_fisher`
    tokens       int64 (D, T), the calibration text itself
    seed         int
    ratio, kinds, protect, align, cuts  of the plan, for criteria that prune as they rank
    take_heads, ridge  of saap_plus
    variant, query_heads  of llm_pruner

A new one is a file here, a row in `CRITERIA`, one in `tasks/criteria.py` (what it needs, which search it was published
with), and its name in `tasks/config.py`. It does not change the model it is given.
"""

from collections.abc import Callable

import numpy as np

from .flap import flap
from .gisp import gisp
from .hywia import hywia
from .llm_pruner import llm_pruner
from .loraprune import loraprune
from .lorashear import lorashear
from .magnitude import magnitude
from .random import random
from .reap import reap
from .saap_gates import saap_gates
from .saap_plus import saap_plus
from .wanda_sp import wanda_sp

CRITERIA: dict[str, Callable[..., np.ndarray]] = {
    "saap_plus": saap_plus,
    "saap_gates": saap_gates,
    "llm_pruner": llm_pruner,
    "wanda_sp": wanda_sp,
    "flap": flap,
    "gisp": gisp,
    "hywia": hywia,
    "loraprune": loraprune,
    "lorashear": lorashear,
    "magnitude": magnitude,
    "reap": reap,
    "random": random,
}

__all__ = ["CRITERIA"]
