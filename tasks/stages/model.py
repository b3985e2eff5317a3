"""The embedded model: GGUF in, plain float safetensors out."""

from pathlib import Path

from tasks.inputs import Checkpoint, Gguf
from tasks.stage import Summary, stage, weights_of
from tasks.step import Step


@stage(version=2, publishes=Checkpoint, params=lambda config: {}, fingerprint=weights_of)
def model(step: Step, folder: Path, *, gguf: Gguf) -> Summary:
    from saap import convert_gguf

    convert_gguf(gguf.place, folder)
    return {"bytes": (folder / "model.safetensors").stat().st_size}
