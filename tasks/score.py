"""Per-sample coarse and fine importance of every coupled group."""

from pathlib import Path
from typing import Any

from storage.tables import sample_writer
from tasks.compute import calibration_tokens, checkpoint
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("score")
def score(step: Step, folder: Path) -> dict[str, Any]:
    from saap import discover
    from saap.scoring.importance import score_batches

    config = step.config()
    model, _ = checkpoint(step, "model", use="blocks")
    tokens = calibration_tokens(step)
    groups = discover(model)
    with sample_writer(folder, "importance", vars(groups)) as writer:
        for vector, element in score_batches(model, tokens, config["hessian"], config["vector_unit"]):
            writer.write(vector=vector, element=element)
    return {"samples": len(tokens), "groups": len(groups)}
