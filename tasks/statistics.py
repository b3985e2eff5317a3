"""Statistics as criteria take them, read from the artifacts of the stages that published them."""

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from storage.tables import read_samples, read_table
from tasks.compute import calibration_tokens
from tasks.step import Step


def read_statistic(step: Step, name: str) -> Any:
    """An argument of a criterion, by its name in `tasks/criteria.py`; the step's input of the same name."""
    return calibration_tokens(step) if name == "tokens" else _READERS[name](step.folder(name))


def _score(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_samples(folder, "importance")
    return found["vector"], found["element"]


def _gradients(folder: Path) -> Any:
    from saap.scoring.statistics import TaylorSums

    found = read_table(folder, "taylor")
    return TaylorSums(**{field.name: found[field.name] for field in fields(TaylorSums)})


def _activations(folder: Path) -> Any:
    from saap.scoring.statistics import Moments

    found = read_table(folder, "moments")
    edges = np.append(np.flatnonzero(found["channel"] == 0), len(found["channel"]))
    return {
        (int(found["layer"][start]), str(found["kind"][start])): Moments(
            *(found[name][start:end] for name in ("mean", "variance", "norm"))
        )
        for start, end in pairwise(edges)
    }


def _fisher(folder: Path) -> Any:
    return read_table(folder, "fisher")["fisher"]


_READERS: dict[str, Callable[[Path], Any]] = {
    "score": _score,
    "gradients": _gradients,
    "activations": _activations,
    "fisher": _fisher,
}
