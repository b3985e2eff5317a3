"""Models larger than their device: the weights of a layer stay in the checkpoint's files until the layer runs."""

import copy
from typing import Any

import torch
from torch import nn

from saap.models.families import family_of


def device_map(config: Any, device: str) -> dict[str, str]:
    """accelerate's device_map for a model of that config: layers on disk, everything else on `device`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    layers = family_of(config).layers(model)
    (path,) = (name for name, module in model.named_modules() if module is layers)
    others = {
        name: device
        for name, _ in model.named_modules()
        if name and not f"{path}.".startswith(f"{name}.") and not name.startswith(f"{path}.")
    }
    return others | {f"{path}.{number}": "disk" for number in range(len(layers))}


def input_device(model: nn.Module) -> torch.device:
    """Where token ids have to be; the CPU for an embedding that accelerate keeps elsewhere."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.device("cpu") if weight.is_meta else weight.device


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model on the CPU or on disk, away from the device that computes."""
    return any(parameter.is_meta for parameter in model.parameters())
