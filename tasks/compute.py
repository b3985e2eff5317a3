"""How a step does its work: device, threads, batch size."""

import json
import os
from dataclasses import replace
from functools import cache
from typing import Any

from tasks.config import RunConfig
from tasks.step import Step

# of the recover section: with them memory and time change, and the result by rounding only
MEMORY = ("micro_batch_size", "gradient_checkpointing")


def compute_of(config: RunConfig) -> str:
    """What is in no key, as JSON: the compute section, and how recovery fits into memory."""
    return json.dumps(config.compute.model_dump() | {name: getattr(config.recover, name) for name in MEMORY})


def placed(step: Step, gpu: str | None, threads: int | None) -> Step:
    """The same step for one place: its CUDA_VISIBLE_DEVICES, and threads where the configuration says none."""
    compute = json.loads(step.compute)
    return replace(step, compute=json.dumps(compute | {"gpu": gpu, "threads": compute["threads"] or threads}))


def take_place(step: Step) -> None:
    """See the GPU of this place only. Before torch looks for GPUs: it does so once a process."""
    gpu = json.loads(step.compute).get("gpu")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def compute_settings(step: Step) -> dict[str, Any]:
    """`compute_of` the run, with device resolved; sets the number of CPU threads."""
    import torch

    values: dict[str, Any] = json.loads(step.compute)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    every = _all_threads()
    torch.set_num_threads(values["threads"] or every)
    return values


@cache
def _all_threads() -> int:
    """As many as torch takes by itself. Asked before the first step of a process changes it."""
    import torch

    return torch.get_num_threads()
