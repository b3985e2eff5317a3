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

# oneDNN, and PyTorch around it, remember 1,024 shapes of products each, at a quarter of a megabyte: every length of a
# batch with every width of an uneven model. One pass through a model has fewer; a new one costs half a millisecond.
SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def compute_of(config: RunConfig) -> str:
    """What is in no key, as JSON: the compute section, and how recovery fits into memory."""
    return json.dumps(config.compute.model_dump() | {name: getattr(config.recover, name) for name in MEMORY})


def placed(step: Step, gpu: str | None, threads: int | None) -> Step:
    """The same step for one place: its CUDA_VISIBLE_DEVICES, and threads where the configuration says none."""
    compute = json.loads(step.compute)
    return replace(step, compute=json.dumps(compute | {"gpu": gpu, "threads": compute["threads"] or threads}))


def take_place(step: Step) -> None:
    """See the GPU of this place only, remember few shapes of products. Before torch looks: it does so once a process.

    What the user has set for shapes stays.
    """
    for name, value in SHAPES.items():
        os.environ.setdefault(name, value)
    gpu = json.loads(step.compute).get("gpu")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def compute_settings(step: Step) -> dict[str, Any]:
    """`compute_of` the run, with device resolved; sets the number of CPU threads, and the GPU that CUDA works on."""
    import torch

    values: dict[str, Any] = json.loads(step.compute)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["device"].startswith("cuda"):  # streams, events and other people's kernels take the current one
        torch.cuda.set_device(int(values["device"].partition(":")[2] or 0))
    every = _all_threads()
    torch.set_num_threads(values["threads"] or every)
    return values


@cache
def _all_threads() -> int:
    """As many as torch takes by itself. Asked before the first step of a process changes it."""
    import torch

    return torch.get_num_threads()
