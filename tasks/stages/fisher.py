"""What the removal of each group costs, in units of the loss."""

from pathlib import Path

import numpy as np

from storage.tables import read_table, write_table
from tasks.artifact import Artifact
from tasks.compute import compute_settings
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.calibrate import Calibration
from tasks.step import Step


class Fisher(Artifact):
    """fisher.parquet."""

    def read(self) -> np.ndarray:
        """float64 (groups,)."""
        return read_table(self.place, "fisher")["fisher"]


@stage(version=4, publishes=Fisher, params=groups_of, fingerprint=weights_of)
def fisher(step: Step, folder: Path, *, model: Checkpoint, calibration: Calibration) -> Summary:
    import saap

    dense, tokens = load_model(step, model, use="layers"), calibration.read()
    found = saap.mask_fisher(dense, tokens, batch_size=compute_settings(step)["batch_size"])
    write_table(folder, "fisher", {**vars(saap.discover(dense)), "fisher": found})
    return {"samples": len(tokens)}
