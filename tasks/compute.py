"""Device, threads, and the model a step works on."""

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from storage.tables import read_table
from tasks.step import Step

if TYPE_CHECKING:
    import torch
    from torch import nn


def settings(step: Step) -> dict[str, Any]:
    """The compute section, with device resolved; sets the number of CPU threads."""
    import torch

    values: dict[str, Any] = json.loads(step.compute)
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["threads"]:
        torch.set_num_threads(values["threads"])
    return values


def checkpoint(
    step: Step, name: str, *, float_weights: bool = False, use: Literal["whole", "blocks", "slices"] = "whole"
) -> tuple["nn.Module", Any]:
    """(model, tokenizer) of an input, on the step's device.

    float_weights replaces int4 layers by float ones of the same values. use: with compute.offload, a model that is used
    block by block leaves the weights of its blocks on disk, and one that is only sliced stays on the CPU. The last
    model stays loaded for the next step: do not change it.
    """
    values = settings(step)
    offload = values["offload"] and use == "blocks"
    device = "cpu" if values["offload"] and use == "slices" else values["device"]
    return _load(step.folder(name), step.folder("tokenizer"), step.config()["dtype"], device, float_weights, offload)


@lru_cache(maxsize=1)
def _load(
    folder: Path, tokenizer: Path, dtype: str, device: str, float_weights: bool, offload: bool
) -> tuple["nn.Module", Any]:
    from saap import dequantize, load, load_tokenizer

    model = load(folder, dtype=dtype, device=device, offload=offload)
    return (dequantize(model) if float_weights else model), load_tokenizer(tokenizer)


def calibration_tokens(step: Step) -> "torch.Tensor":
    """The calibration sequences, int64 (samples, length), of the step's input `calibration`."""
    import torch

    calibration = read_table(step.folder("calibration"), "calibration")
    samples = int(calibration["sample"][-1]) + 1
    return torch.from_numpy(calibration["token"].astype("int64")).view(samples, -1)


def forget() -> None:
    """Let go of the model that `checkpoint` keeps."""
    _load.cache_clear()
