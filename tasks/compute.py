"""How a step does its work: device, threads, batch size."""

import json
from typing import Any

from tasks.config import RunConfig
from tasks.step import Step

# of the recover section: with them memory and time change, and the result by rounding only
MEMORY = ("micro_batch_size", "gradient_checkpointing")


def compute_of(config: RunConfig) -> str:
    """What is in no key, as JSON: the compute section, and how recovery fits into memory."""
    return json.dumps(config.compute.model_dump() | {name: getattr(config.recover, name) for name in MEMORY})


def compute_settings(step: Step) -> dict[str, Any]:
    """`compute_of` the run, with device resolved; sets the number of CPU threads."""
    import torch

    values: dict[str, Any] = json.loads(step.compute)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["threads"]:
        torch.set_num_threads(values["threads"])
    return values
