"""Taylor importances from summed gradients, as LLM-Pruner has them."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from storage.tables import read_table, write_table
from tasks.artifact import Artifact
from tasks.compute import compute_settings
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.calibrate import Calibration
from tasks.step import Step

if TYPE_CHECKING:
    from saap.scoring.statistics import TaylorSums


class Taylor(Artifact):
    """taylor.parquet."""

    def read(self) -> "TaylorSums":
        from saap.scoring.statistics import TaylorSums

        table = read_table(self.place, "taylor")
        return TaylorSums(**{field.name: table[field.name] for field in fields(TaylorSums)})


@stage(version=4, publishes=Taylor, params=groups_of, fingerprint=weights_of)
def gradients(step: Step, folder: Path, *, model: Checkpoint, calibration: Calibration) -> Summary:
    import saap

    dense, tokens = load_model(step, model), calibration.read()
    sums = saap.taylor_sums(dense, tokens, batch_size=compute_settings(step)["batch_size"])
    write_table(folder, "taylor", {**vars(saap.discover(dense)), **vars(sums)})
    return {"samples": len(tokens)}
