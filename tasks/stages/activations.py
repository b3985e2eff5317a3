"""Means, variances and norms of what heads and channels write."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storage.tables import read_table, write_table
from tasks.artifact import Artifact
from tasks.compute import compute_settings
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, dtype_of, stage, weights_of
from tasks.stages.calibrate import Calibration
from tasks.step import Step

if TYPE_CHECKING:
    from saap.scoring.statistics import Moments


class Activations(Artifact):
    """moments.parquet: a row an input channel, the channels of a (layer, kind) one after the other."""

    def read(self) -> "dict[tuple[int, str], Moments]":
        """(layer, kind) → moments of its input channels."""
        from saap.scoring.statistics import Moments

        table = read_table(self.place, "moments")
        edges = np.append(np.flatnonzero(table["channel"] == 0), len(table["channel"]))
        return {
            (int(table["layer"][start]), str(table["kind"][start])): Moments(
                *(table[name][start:end] for name in ("mean", "variance", "norm"))
            )
            for start, end in pairwise(edges)
        }


@stage(version=1, publishes=Activations, params=dtype_of, fingerprint=weights_of)
def activations(step: Step, folder: Path, *, model: Checkpoint, calibration: Calibration) -> Summary:
    import saap

    tokens = calibration.read()
    dense = load_model(step, model, use="layers")
    found = saap.input_moments(dense, tokens, batch_size=compute_settings(step)["batch_size"])
    size = [len(moments.mean) for moments in found.values()]
    write_table(
        folder,
        "moments",
        {
            "layer": np.repeat([layer for layer, _ in found], size),
            "kind": np.repeat([kind for _, kind in found], size),
            "channel": np.concatenate([np.arange(count) for count in size]),
            **{
                name: np.concatenate([getattr(moments, name) for moments in found.values()])
                for name in ("mean", "variance", "norm")
            },
        },
    )
    return {"samples": len(tokens)}
