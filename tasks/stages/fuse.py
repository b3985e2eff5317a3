"""Coarse and fine importance become one."""

from pathlib import Path

import numpy as np

from storage.tables import read_samples, sample_writer, write_table
from tasks.artifact import Artifact
from tasks.stage import Summary, stage
from tasks.stages.score import Importance
from tasks.step import Step


class Fused(Artifact):
    """fused.parquet, and lambdas.parquet."""

    def read(self) -> np.ndarray:
        """Fused importance, float64 (samples, groups)."""
        return read_samples(self.place, "fused")["fused"]


@stage(version=1, publishes=Fused, params=lambda config: config.fuse.model_dump())
def fuse(step: Step, folder: Path, *, importance: Importance) -> Summary:
    import saap

    table = importance.table()
    coordinates = {name: table[name] for name in ("layer", "kind", "unit")}
    groups = saap.Groups(**coordinates, parameters=np.zeros(len(table["layer"]), np.int64))
    fused, lambda1, lambda2 = saap.fuse(table["vector"], table["element"], groups, **step.config())
    with sample_writer(folder, "fused", coordinates) as writer:
        writer.write(fused=fused)
    write_table(folder, "lambdas", {**coordinates, "lambda_vector": lambda1, "lambda_element": lambda2})
    return {"samples": len(fused), "groups": len(groups)}
