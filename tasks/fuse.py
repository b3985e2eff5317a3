"""Coarse and fine importance become one."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.tables import read_samples, sample_writer, write_table
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("fuse")
def fuse(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    importance = read_samples(step.folder("importance"), "importance")
    coordinates = {name: importance[name] for name in ("layer", "kind", "unit")}
    groups = saap.Groups(**coordinates, parameters=np.zeros(len(importance["layer"]), np.int64))
    fused, lambda1, lambda2 = saap.fuse(importance["vector"], importance["element"], groups, **step.config())
    with sample_writer(folder, "fused", coordinates) as writer:
        writer.write(fused=fused)
    write_table(folder, "lambdas", {**coordinates, "lambda_vector": lambda1, "lambda_element": lambda2})
    return {"samples": len(fused), "groups": len(groups)}
