"""From a size to the plan that meets it: the ratio is found, and the last steps of channels follow the size itself."""

from collections.abc import Callable
from typing import Any

import numpy as np

from saap.errors import OutOfReach
from saap.models.groups import Groups
from saap.pruning.plan import PROTECTED, protected_groups, select

Size = Callable[[np.ndarray], float]

_TRIES = 12
_NEAR = 1e-4  # of the ratio: no two plans of a real model lie closer


def select_for(
    score: np.ndarray,
    groups: Groups,
    size: Size,
    wanted: float,
    *,
    direction: str = "lowest",
    protect: tuple[int, ...] = PROTECTED,
    align: int = 32,
    **options: Any,
) -> tuple[np.ndarray, float]:
    """(bool (N,), True for the groups that stay; the ratio it was found at), so that size(keep) is near `wanted`.

    Args:
        score, direction, protect, align, options: as for `select`.
        size: of a plan, bool (N,): parameters, bytes, seconds; less when more groups go.
        wanted: below the size of the whole model.

    The ratio is the one whose plan comes nearest. A share for each layer and whole heads leave it off by many steps of
    channels, so then single steps go or come back, each layer in turn, lowest score first, until the nearest step is
    reached. In a mixture of experts the plan stays as `select` has it.
    Raises OutOfReach where the smallest plan is larger; its `smallest` is the size of that.
    """
    options |= {"direction": direction, "protect": protect, "align": align}
    keep, ratio, limited = _nearest(score, groups, size, wanted, options)
    if "expert" not in groups.kind:
        worth = score if direction == "lowest" else -score
        free = ~protected_groups(groups, protect) & (groups.kind == "mlp")
        keep, limited = _stepwise(keep, worth, groups, free, align, size, wanted)
    if limited and size(keep) > wanted:
        raise OutOfReach("no plan is so small", smallest=size(keep))
    return keep, ratio


def _nearest(
    score: np.ndarray, groups: Groups, size: Size, wanted: float, options: dict[str, Any]
) -> tuple[np.ndarray, float, bool]:
    """The plan and ratio nearest to the size, and whether larger ratios are out of reach.

    By false position, since sizes are nearly straight lines in the ratio; halved where there is no plan.
    """
    whole = np.ones(len(groups), bool)
    low, high, at_low, at_high = 0.0, 1.0, size(whole), size(~whole)
    if at_high >= at_low:
        raise OutOfReach("what is removed makes it no smaller or faster", smallest=at_high)
    best, found, limited = whole, 0.0, False
    for _ in range(_TRIES):
        share = 0.5 if limited else (at_low - wanted) / (at_low - at_high)
        ratio = min(max(low + (high - low) * share, low + _NEAR / 2), high - _NEAR / 2)
        try:
            keep = select(score, groups, ratio, **options)
        except OutOfReach:
            high, limited = ratio, True
        else:
            now = size(keep)
            if abs(now - wanted) < abs(size(best) - wanted) or not found:
                best, found = keep, ratio
            if now > wanted:
                low, at_low = ratio, now
            else:
                high, at_high, limited = ratio, now, False
            if abs(now - wanted) <= _NEAR * size(whole):
                break
        if high - low <= _NEAR:
            break
    return best, found, limited


def _stepwise(
    keep: np.ndarray, worth: np.ndarray, groups: Groups, free: np.ndarray, align: int, size: Size, wanted: float
) -> tuple[np.ndarray, bool]:
    """The plan after single steps of channels towards the size, and whether these came to an end before it."""
    orders = {
        layer: index[np.argsort(worth[index], kind="stable")]
        for layer, _, index in groups.structures()
        if free[index[0]]
    }
    moved = dict.fromkeys(orders, 0)
    while (miss := size(keep) - wanted) != 0:
        moves = []
        for layer, order in orders.items():
            own = order[keep[order]] if miss > 0 else order[~keep[order]][::-1]
            kept = int(keep[order].sum())
            after = (kept - 1) // align * align if miss > 0 else min((kept // align + 1) * align, len(order))
            if after >= min(align, len(order)) and after != kept:
                step = own[: abs(kept - after)]
                mean = float(worth[step].mean())
                moves.append((moved[layer], mean if miss > 0 else -mean, layer, step))
        if not moves:
            return keep, True
        *_, layer, step = min(moves, key=lambda move: move[:3])
        after_it = keep.copy()
        after_it[step] = miss < 0
        if abs(size(after_it) - wanted) >= abs(miss):
            return keep, False
        keep = after_it
        moved[layer] += 1
    return keep, False
