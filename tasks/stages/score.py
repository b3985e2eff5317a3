"""Per-sample coarse and fine importance of every coupled group."""

from pathlib import Path

import numpy as np

from storage.tables import read_samples, sample_writer
from tasks.artifact import Artifact
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.calibrate import Calibration
from tasks.step import Step


class Importance(Artifact):
    """importance.parquet."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Coarse and fine importance, float32 (samples, groups) each."""
        table = self.table()
        return table["vector"], table["element"]

    def table(self) -> dict[str, np.ndarray]:
        """layer, kind, unit (groups,); vector and element (samples, groups)."""
        return read_samples(self.place, "importance")


@stage(
    version=3,
    publishes=Importance,
    params=lambda config: config.score.model_dump() | groups_of(config),
    fingerprint=weights_of,
)
def score(step: Step, folder: Path, *, model: Checkpoint, calibration: Calibration) -> Summary:
    from saap import discover
    from saap.scoring.importance import score_batches

    config, tokens = step.config(), calibration.read()
    dense = load_model(step, model, use="layers")
    groups = discover(dense)
    with sample_writer(folder, "importance", vars(groups)) as writer:
        for vector, element in score_batches(dense, tokens, config["hessian"], config["vector_unit"]):
            writer.write(vector=vector, element=element)
    return {"samples": len(tokens), "groups": len(groups)}
