"""One budget over heads, experts and channels of experts."""

import numpy as np

from saap.errors import SaapError
from saap.models.groups import Groups


def select_experts(worth: np.ndarray, groups: Groups, ratio: float, protected: np.ndarray, align: int) -> np.ndarray:
    """bool (N,): True for the groups that stay; worth: float (N,), the lowest go first.

    Heads, whole experts, and steps of `align` channels (the worst that each expert of the layer still has: they all
    keep as many) are put in one order, each by the mean worth of its groups, and go until the share `ratio` of the
    parameters is gone. Each costs what it holds at that moment: an expert its remaining channels, a step of channels
    those of the experts that are left. A layer keeps as many experts as the router picks (`groups.fewest`), and a head
    and a step of channels.

    Raises SaapError when the ratio cannot be reached.
    """
    keep, cost = np.ones(len(groups), bool), groups.parameters
    channels = {layer: index.reshape(groups.stretches(layer, kind), -1)
                for layer, kind, index in groups.structures() if kind == "mlp"}  # fmt: skip
    steps: list[tuple[float, int, str, np.ndarray]] = []  # worth, layer, kind, groups that go together
    for layer, kind, index in groups.structures():
        if protected[index[0]]:
            continue
        rows = index.reshape(groups.stretches(layer, kind), -1)
        # in each stretch the worst first
        order = np.take_along_axis(rows, np.argsort(worth[rows], 1, kind="stable"), 1)
        size = align if kind == "mlp" else 1
        least = groups.fewest(layer) if kind == "expert" else size
        for start in range(0, order.shape[1] - least - (size - 1), size):
            together = order[:, start : start + size].ravel()
            steps.append((float(worth[together].mean()), layer, kind, together))
    budget, gone = ratio * int(cost.sum()), 0
    for _, layer, kind, together in sorted(steps, key=lambda step: step[0]):
        going = together[keep[together]]
        if kind == "expert":
            first = int(np.flatnonzero((groups.layer == layer) & (groups.kind == "expert"))[0])
            own = channels[layer][together - first].ravel()
            going = np.concatenate([going, own[keep[own]]])
        step = int(cost[going].sum())
        if gone + step - budget > budget - gone:  # nearer without it
            break
        keep[going] = False
        gone += step
    else:
        if gone < 0.99 * budget:
            raise SaapError(
                f"ratio {ratio} cannot be reached: at most {gone / cost.sum():.3f} of the parameters can go"
            )
    return keep
