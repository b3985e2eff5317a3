"""The embedded model: GGUF in, plain float safetensors out."""

from pathlib import Path
from typing import Any

from tasks.stage import stage_task
from tasks.step import Step


@stage_task("model")
def model(step: Step, folder: Path) -> dict[str, Any]:
    from saap import convert_gguf

    convert_gguf(step.folder("gguf"), folder)
    return {"bytes": (folder / "model.safetensors").stat().st_size}
