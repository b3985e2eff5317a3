"""How long a plan takes to decode a token, from measured times of the model with narrower layers."""

from collections.abc import Iterable, Iterator

import numpy as np

from saap.models.groups import Groups

SHARES = {"attention": (1 / 3, 2 / 3), "mlp": (0.25, 0.5, 0.75)}  # of the units, at which times are measured


def narrowed(groups: Groups, align: int = 32) -> Iterator[tuple[str, float, np.ndarray]]:
    """(kind, share of its units that stays, bool (N,)): plans with one kind of structure narrowed in every layer.

    Attention keeps whole groups, the same number of every stretch, MLP whole steps of `align` channels; one at least.
    """
    for kind, shares in SHARES.items():
        seen = {1.0}
        for wanted in shares:
            keep = np.ones(len(groups), bool)
            for layer, own, index in groups.structures():
                if own == kind:
                    step = align if kind == "mlp" else groups.stretches(layer, kind)
                    count = min(max(round(wanted * len(index) / step), 1) * step, len(index))
                    for stretch in np.split(index, stretches := groups.stretches(layer, kind)):
                        keep[stretch[count // stretches :]] = False
            mine = groups.kind == kind
            share = float(keep[mine].mean()) if mine.any() else 1.0
            if share not in seen:
                seen.add(share)
                yield kind, share, keep


class DecodeTime:
    """Time for a token of a plan, as a share of the dense model's.

    measured: (kind, share of its units that stay, time as a share of the dense model's). Between them the time of a
    kind is a straight line, and below the lowest it goes on. What all layers of a kind save is shared out by their
    parameters, and what the kinds save is added. So embeddings, head and norms, which stay, need no time of their own.
    Noise makes no narrower layer slower: a time is at most that of the next wider one.
    """

    def __init__(self, groups: Groups, measured: Iterable[tuple[str, float, float]]) -> None:
        self._groups = groups
        self._lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        points: dict[str, list[tuple[float, float]]] = {}
        for kind, share, time in measured:
            points.setdefault(kind, []).append((share, time))
        for kind, own in points.items():
            shares, times = np.array(sorted([*own, (1.0, 1.0)])).T
            times = np.minimum.accumulate(times[::-1])[::-1]
            slope = (times[1] - times[0]) / (shares[1] - shares[0])
            lowest = times[0] - slope * shares[0]
            self._lines[kind] = np.concatenate([[0.0], shares]), np.concatenate([[lowest], times])
        totals = {kind: int(groups.parameters[groups.kind == kind].sum()) for kind in self._lines}
        self._structures = [
            (kind, index, int(groups.parameters[index].sum()) / totals[kind])
            for _, kind, index in groups.structures()
            if kind in totals
        ]

    def __call__(self, keep: np.ndarray) -> float:
        """The time with the groups keep, bool (N,)."""
        return 1.0 - sum(
            weight * (1.0 - float(np.interp(keep[index].mean(), *self._lines[kind])))
            for kind, index, weight in self._structures
        )
