"""Taylor importances from summed gradients, as LLM-Pruner has them."""

from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import calibration_tokens, checkpoint, settings
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("gradients")
def gradients(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    model, _ = checkpoint(step, "model")
    tokens = calibration_tokens(step)
    sums = saap.taylor_sums(model, tokens, batch_size=settings(step)["batch_size"])
    write_table(folder, "taylor", {**vars(saap.discover(model)), **vars(sums)})
    return {"samples": len(tokens)}
