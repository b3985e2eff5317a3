"""Second moments of what heads and channels write, for least squares."""

from pathlib import Path
from typing import Any

from tasks.compute import calibration_tokens, checkpoint, settings
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("grams")
def grams(step: Step, folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    import saap

    model, _ = checkpoint(step, "model")
    tokens = calibration_tokens(step)
    found = saap.input_grams(model, tokens, batch_size=settings(step)["batch_size"])
    save_file({f"{layer}.{kind}": gram for (layer, kind), gram in found.items()}, folder / "grams.safetensors")
    return {"samples": len(tokens)}
