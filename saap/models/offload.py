"""Models larger than their device: the weights of a block stay in the checkpoint's files until the block runs."""

import copy
from typing import Any

import torch

from saap.models.families import family_of


def device_map(config: Any, device: str) -> dict[str, str]:
    """accelerate's device_map for a model of that config: blocks on disk, everything else on `device`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    blocks = family_of(config).blocks(model)
    (path,) = (name for name, module in model.named_modules() if module is blocks)
    others = {
        name: device
        for name, _ in model.named_modules()
        if name and not f"{path}.".startswith(f"{name}.") and not name.startswith(f"{path}.")
    }
    return others | {f"{path}.{number}": "disk" for number in range(len(blocks))}
