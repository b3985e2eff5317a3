"""What the removal of each group costs, in units of the loss."""

from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import calibration_tokens, checkpoint, settings
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("fisher")
def fisher(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    model, _ = checkpoint(step, "model")
    tokens = calibration_tokens(step)
    found = saap.mask_fisher(model, tokens, batch_size=settings(step)["batch_size"])
    write_table(folder, "fisher", {**vars(saap.discover(model)), "fisher": found})
    return {"samples": len(tokens)}
