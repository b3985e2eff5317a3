"""How a step does its work: device, threads, batch size."""

import json
from typing import Any

from tasks.step import Step


def compute_settings(step: Step) -> dict[str, Any]:
    """The compute section, with device resolved; sets the number of CPU threads."""
    import torch

    values: dict[str, Any] = json.loads(step.compute)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["threads"]:
        torch.set_num_threads(values["threads"])
    return values
