"""From a score per group to the groups that stay, under a budget of parameters."""

import math
from collections.abc import Callable

import numpy as np

from saap.errors import OutOfReach, SaapError
from saap.models.groups import Groups
from saap.pruning.experts import select_experts

SEARCHES = ("global", "uniform", "uniform_down")
DIRECTIONS = ("lowest", "highest")
KINDS_SHARE = ("pooled", "equal", "mlp")
PROTECTED = (0, 1, 2, -1)


def select(
    score: np.ndarray,
    groups: Groups,
    ratio: float,
    *,
    search: str = "global",
    direction: str = "lowest",
    kinds: str = "pooled",
    protect: tuple[int, ...] = PROTECTED,
    align: int = 32,
) -> np.ndarray:
    """bool (N,): True for the groups that stay.

    Args:
        score: float (N,), e.g. the ASI of each group.
        ratio: share, in (0, 1), to remove of the parameters of all prunable structures, protected ones counted.
        search: 'global': all unprotected groups ordered together, removed until the parameter budget is met;
            'uniform': the same share of every unprotected layer, heads rounded to the nearest whole one;
            'uniform_down': the same with heads rounded down, as LLM-Pruner, Wanda-sp and LoRAPrune do in their code.
            In both the channels of a layer make up for what whole heads take too much or too little.
        direction: which end of the score is removed. 'highest' is the literal text of the paper.
        kinds: how heads and channels share the budget: 'pooled': as their scores have it; 'equal': the same share of
            the unprotected parameters of each (of each layer already in a uniform search); 'mlp': channels only.
        protect: layers left whole; negative numbers count from the end.
        align: a layer's MLP keeps a multiple of this many channels (or all of them), the best-scored ones; the
            budget is met within half a step a layer.

    Every layer keeps at least one attention group (of query heads one under each KV head) and one step of channels.
    Raises SaapError for a bad argument or a score that is not finite, OutOfReach for a ratio out of reach.
    """
    if search not in SEARCHES or direction not in DIRECTIONS or kinds not in KINDS_SHARE:
        raise SaapError(f"search must be one of {SEARCHES}, direction of {DIRECTIONS}, kinds of {KINDS_SHARE}")
    if not 0 < ratio < 1:
        raise SaapError(f"ratio must lie between 0 and 1 (both excluded), got {ratio}")
    if align < 1:
        raise SaapError(f"align must be at least 1, got {align}")
    if not np.isfinite(score).all():
        raise SaapError("a score is not finite")
    protected = protected_groups(groups, protect)
    if kinds == "mlp":
        protected |= groups.kind == "attention"
    if "expert" in groups.kind:
        if kinds == "equal":
            raise SaapError("with experts prune.kinds is 'pooled', or 'mlp' (whole experts and channels, no heads)")
        return select_experts(score if direction == "lowest" else -score, groups, ratio, protected, align, search)
    worth = bundled(score if direction == "lowest" else -score, groups)
    free = int(groups.parameters[~protected].sum())
    budget = ratio * int(groups.parameters.sum())
    if budget >= free:
        share = free / int(groups.parameters.sum())
        raise OutOfReach(
            f"ratio {ratio} cannot be reached: what may be pruned holds {share:.3f} of the prunable parameters; lower "
            "the ratio, protect fewer layers" + (", or let heads go too (kinds)" if kinds == "mlp" else "")
        )
    counts = _SHARES.get(search) or (_each_kind if kinds == "equal" else _global)
    return _keep_best(worth, groups, _whole_bundles(counts(worth, groups, budget, protected, align), groups))


def protected_groups(groups: Groups, protect: tuple[int, ...]) -> np.ndarray:
    """bool (N,): the groups of these layers. Raises SaapError for a layer that the model does not have."""
    layers = int(groups.layer.max()) + 1
    for layer in protect:
        if not -layers <= layer < layers:
            raise SaapError(f"protect names layer {layer}, but the model has {layers} layers")
    return np.isin(groups.layer, [layer % layers for layer in protect])


Counts = dict[tuple[int, str], int]
Round = Callable[[float], int]


def _keep_best(worth: np.ndarray, groups: Groups, counts: Counts) -> np.ndarray:
    keep = np.zeros(len(groups), bool)
    for layer, kind, index in groups.structures():
        for own in np.split(index, stretches := groups.stretches(layer, kind)):
            best = own[np.argsort(-worth[own], kind="stable")]
            keep[best[: counts[layer, kind] // stretches]] = True
    return keep


def bundled(worth: np.ndarray, groups: Groups) -> np.ndarray:
    """Scores for groups that go evenly from several stretches: the worst of each go together, at their mean worth.

    So the order within a stretch stays, and groups that must go together are next to each other in every order.
    """
    worth = worth.astype(np.float64)
    for layer, kind, index in groups.structures():
        stretches = groups.stretches(layer, kind)
        if stretches > 1:
            own = worth[index].reshape(stretches, -1)
            order = np.argsort(own, 1, kind="stable")
            np.put_along_axis(own, order, np.take_along_axis(own, order, 1).mean(0)[None].repeat(stretches, 0), 1)
            worth[index] = own.ravel()
    return worth


def _whole_bundles(counts: Counts, groups: Groups) -> Counts:
    """The same for each stretch: counts rounded to whole bundles, one at least."""
    whole = {}
    for structure, count in counts.items():
        size = groups.stretches(*structure)
        whole[structure] = count if size == 1 else max(1, round(count / size)) * size
    return whole


def _may_go(worth: np.ndarray, groups: Groups, protected: np.ndarray, align: int) -> np.ndarray:
    """bool (N,): all but the protected, and the best of each layer: one group of each stretch, one step of channels."""
    candidate = ~protected
    for layer, kind, index in groups.structures():
        best = index[np.argsort(-worth[index], kind="stable")]
        candidate[best[: groups.stretches(layer, kind) if kind == "attention" else align]] = False
    return candidate


def _global(worth: np.ndarray, groups: Groups, budget: float, protected: np.ndarray, align: int) -> Counts:
    order = np.flatnonzero(_may_go(worth, groups, protected, align))
    order = order[np.argsort(worth[order], kind="stable")]
    removed = np.concatenate([[0], np.cumsum(groups.parameters[order])])
    if removed[-1] < budget:
        raise OutOfReach(
            f"ratio {budget / groups.parameters.sum():.3f} cannot be reached: with the fewest heads and {align} "
            f"channels left in every unprotected layer at most {removed[-1] / groups.parameters.sum():.3f} can go"
        )
    keep = np.ones(len(groups), bool)
    keep[order[: int(np.abs(removed - budget).argmin())]] = False

    counts: Counts = {}
    partial: list[tuple[int, str]] = []
    sizes: dict[tuple[int, str], int] = {}
    for layer, kind, index in groups.structures():
        counts[layer, kind] = int(keep[index].sum())
        sizes[layer, kind] = len(index)
        if kind == "mlp" and counts[layer, kind] < len(index):
            partial.append((layer, kind))
    # largest remainder: round as many layers up as keeps the total of kept channels nearest to what the cut left
    up = round(sum(counts[structure] % align for structure in partial) / align)
    by_remainder = sorted(partial, key=lambda structure: -(counts[structure] % align))
    for rank, structure in enumerate(by_remainder):
        steps = counts[structure] // align + (1 if rank < up else 0)
        counts[structure] = min(max(steps, 1) * align, sizes[structure])
    return counts


def _each_kind(worth: np.ndarray, groups: Groups, budget: float, protected: np.ndarray, align: int) -> Counts:
    """Heads first, then channels, which can be cut finer, to what is left of the budget."""
    heads, cost = groups.kind == "attention", groups.parameters
    share, most = budget / cost[~protected].sum(), cost[_may_go(worth, groups, protected | ~heads, align)].sum()
    attention = _global(worth, groups, min(share * cost[~protected & heads].sum(), most), protected | ~heads, align)
    attention = _whole_bundles(attention, groups)
    spent = cost[heads & ~_keep_best(worth, groups, attention)].sum()
    mlp = _global(worth, groups, budget - spent, protected | heads, align)
    return {structure: (attention if structure[1] == "attention" else mlp)[structure] for structure in mlp}


def _uniform(
    worth: np.ndarray, groups: Groups, budget: float, protected: np.ndarray, align: int, whole: Round = round
) -> Counts:
    share = budget / int(groups.parameters[~protected].sum())
    counts: Counts = {}
    spare = 0.0  # parameters the heads of a layer, being whole, removed too few (+) or too many (−) of
    for layer, kind, index in groups.structures():
        size, cost = len(index), int(groups.parameters[index[0]])
        if protected[index[0]]:
            counts[layer, kind] = size
        elif kind == "attention":
            bundle = groups.stretches(layer, kind)
            counts[layer, kind] = max(1, whole(size / bundle * (1 - share))) * bundle
            spare = (size * share - (size - counts[layer, kind])) * cost
        else:
            wanted = size * (1 - share) - spare / cost
            if wanted < min(align, size) - align / 2:
                raise OutOfReach(
                    f"ratio {budget / groups.parameters.sum():.3f} cannot be reached: layer {layer} would keep fewer "
                    f"than {min(align, size)} channels; lower the ratio or align, or protect fewer layers"
                )
            counts[layer, kind] = min(max(round(wanted / align), 1) * align, size)
    return counts


def _uniform_down(worth: np.ndarray, groups: Groups, budget: float, protected: np.ndarray, align: int) -> Counts:
    """Where one share of heads and channels alike, heads rounded down, can meet the budget, it has these numbers.

    For with s that share, h of H heads gone and a, m the parameters of heads and channels, h/H ≤ s; so budget/(a + m)
    = (a·h/H + m·s)/(a + m) lies between h/H and s, and rounds down to h heads as well.
    """
    return _uniform(worth, groups, budget, protected, align, lambda kept: math.ceil(kept - 1e-9))


_SHARES = {"uniform": _uniform, "uniform_down": _uniform_down}


def removed_share(groups: Groups, keep: np.ndarray) -> float:
    """Share of the parameters of all prunable structures that the plan removes."""
    return float(groups.parameters[~keep].sum() / groups.parameters.sum())
