"""One budget over heads, experts and channels of experts."""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from saap.errors import OutOfReach
from saap.models.groups import Groups

_LEAST = 0.01  # of a layer's parameters: what a plan may miss of its ratio


@dataclass(frozen=True)
class _Step:
    """Groups that go together. channels: of an expert, its own, which go with it; else none."""

    layer: int
    kind: str
    groups: np.ndarray
    channels: np.ndarray


def select_experts(
    worth: np.ndarray, groups: Groups, ratio: float, protected: np.ndarray, align: int, search: str
) -> np.ndarray:
    """bool (N,): True for the groups that stay; worth: float (N,), the lowest go first.

    global: heads, whole experts, and steps of `align` channels (the worst that each expert of the layer still has: they
    all keep as many) are put in one order, each by the mean worth of its groups, and go until the share `ratio` of the
    parameters is gone. Each costs what it holds at that moment: an expert its remaining channels, a step of channels
    those of the experts that are left, and those alone make its worth.

    uniform, uniform_down: the same share of every layer: of heads and experts the nearest whole numbers (or heads
    rounded down; of experts always the next lower one), and steps of channels make up for what these take too little.

    A layer keeps as many experts as the router picks (`groups.fewest`), and a head and a step of channels.
    Raises OutOfReach when the ratio cannot be reached.
    """
    steps = _steps(worth, groups, protected, align)
    every = [step for own in steps.values() for step in own]
    everything = np.ones(len(groups), bool)
    most = sum(_take(step, everything, groups.parameters) for step in every)
    budget = ratio * int(groups.parameters.sum())
    if most < (1 - _LEAST) * budget:
        share = most / groups.parameters.sum()
        raise OutOfReach(f"ratio {ratio} cannot be reached: at most {share:.3f} of the parameters can go")
    if search == "global":
        return _global(worth, groups, every, budget)
    return _even(groups, steps, budget / int(groups.parameters[~protected].sum()), search)


def _steps(worth: np.ndarray, groups: Groups, protected: np.ndarray, align: int) -> dict[tuple[int, str], list[_Step]]:
    """(layer, kind) → its steps, the worst first."""
    mixtures, nothing = groups.mixtures(), np.empty(0, np.int64)
    found: dict[tuple[int, str], list[_Step]] = {}
    for layer, kind, index in groups.structures():
        if protected[index[0]]:
            continue
        rows = index.reshape(groups.stretches(layer, kind), -1)
        order = np.take_along_axis(
            rows, np.argsort(worth[rows], 1, kind="stable"), 1
        )  # in each stretch the worst first
        count = order.shape[1]
        size = align if kind == "mlp" else 1
        least = groups.fewest(layer) if kind == "expert" else size
        ends = [count - left for left in range((count - 1) // size * size, least - 1, -size)]  # whole steps stay
        pieces = [order[:, start:end].ravel() for start, end in zip([0, *ends], ends, strict=False)]
        own = [nothing] * len(pieces)
        if kind == "expert":
            own = [mixtures[layer][1][piece - index[0]].ravel() for piece in pieces]
        found[layer, kind] = [_Step(layer, kind, *pair) for pair in zip(pieces, own, strict=True)]
    return found


def _global(worth: np.ndarray, groups: Groups, steps: list[_Step], budget: float) -> np.ndarray:
    keep, cost, gone = np.ones(len(groups), bool), groups.parameters, 0
    channels: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        if step.kind == "mlp":
            channels.setdefault(step.layer, []).append(number)
    value = [float(worth[step.groups].mean()) for step in steps]
    queue = [(mean, number) for number, mean in enumerate(value)]
    heapq.heapify(queue)
    done: set[int] = set()
    while queue:
        mean, number = heapq.heappop(queue)
        if number in done or mean != value[number]:  # its worth has changed since
            continue
        step = steps[number]
        size = _size(step, keep, cost)
        if gone + size - budget > budget - gone:  # nearer without it
            break
        gone += _take(step, keep, cost)
        done.add(number)
        if step.kind == "expert":
            for other in channels.get(step.layer, []):
                if other not in done:
                    left = steps[other].groups
                    value[other] = float(worth[left[keep[left]]].mean())
                    heapq.heappush(queue, (value[other], other))
    return keep


def _even(groups: Groups, steps: dict[tuple[int, str], list[_Step]], share: float, search: str) -> np.ndarray:
    """share: of the parameters that may go."""
    keep, cost = np.ones(len(groups), bool), groups.parameters
    allowed: dict[int, float] = {}
    for layer, kind, index in groups.structures():
        if (layer, kind) in steps:
            allowed[layer] = allowed.get(layer, 0.0) + share * int(cost[index].sum())
    for (layer, kind), own in steps.items():  # of a layer heads, then experts, then channels
        if kind == "attention":
            left = (len(own) + 1) * (1 - share)
            count = len(own) + 1 - (math.ceil(left - 1e-9) if search == "uniform_down" else round(left))
            for step in own[:count]:
                allowed[layer] -= _take(step, keep, cost)
            continue
        finer = kind == "expert" and steps.get((layer, "mlp"))
        for step in own:
            if _size(step, keep, cost) > allowed[layer] * (1 if finer else 2):
                break
            allowed[layer] -= _take(step, keep, cost)
        else:
            if kind == "mlp" and own and allowed[layer] > _LEAST * int(cost[groups.layer == layer].sum()):
                raise OutOfReach(f"layer {layer} cannot lose {share:.3f} of what may go: lower the ratio, or align")
    return keep


def _size(step: _Step, keep: np.ndarray, cost: np.ndarray) -> int:
    """The parameters that go with a step now."""
    going = np.concatenate([step.groups, step.channels])
    return int(cost[going[keep[going]]].sum())


def _take(step: _Step, keep: np.ndarray, cost: np.ndarray) -> int:
    size = _size(step, keep, cost)
    keep[step.groups], keep[step.channels] = False, False
    return size
