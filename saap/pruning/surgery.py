"""A plan applied to a model: by slicing its tensors, or by masking them (the oracle of the first)."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.checkpoint import complete
from saap.models.families import family_of
from saap.models.groups import Groups, block_parts, discover


def widths(model: nn.Module, groups: Groups, keep: np.ndarray) -> dict[int, dict[str, Any]]:
    """layer → the configuration fields of the pruned block, e.g. num_attention_heads, intermediate_size."""
    family = family_of(model.config)
    kept: dict[int, dict[str, list[int]]] = {}
    for layer, kind, index in groups.blocks():
        kept.setdefault(layer, {})[kind] = np.flatnonzero(keep[index]).tolist()
    return {layer: family.widths(config, kept[layer]) for layer, config in enumerate(family.block_configs(model))}


@torch.no_grad()
def prune(model: nn.Module, keep: np.ndarray) -> nn.Module:
    """A smaller model that holds only the groups with keep = True. The given model stays as it is.

    keep is bool (N,), columns in the order of `discover(model)`. Weights keep their dtype and device.
    Raises SaapError when keep does not fit the model or empties a block.
    """
    groups = _checked(model, keep)
    rows = {(layer, kind): np.flatnonzero(keep[index]) for layer, kind, index in groups.blocks()}
    state = dict(model.state_dict())
    names = {id(module): name for name, module in model.named_modules()}
    for layer, kinds in enumerate(block_parts(model)):
        for kind, members in kinds.items():
            for part, linear in members:
                kept = torch.from_numpy(rows[layer, kind]).to(linear.weight.device)
                index = (kept[:, None] * part.width + torch.arange(part.width, device=kept.device)).flatten()
                name = names[id(linear)]
                state[f"{name}.weight"] = linear.weight.index_select(part.axis, index)
                if part.axis == 0 and linear.bias is not None:
                    state[f"{name}.bias"] = linear.bias[index]
    with torch.device("meta"):
        small = family_of(model.config).uneven(model.config, widths(model, groups, keep))
    small.load_state_dict(
        {name: tensor if name.endswith("inv_freq") else tensor.clone() for name, tensor in state.items()}, assign=True
    )
    return complete(small, model)


@torch.no_grad()
def mask(model: nn.Module, keep: np.ndarray) -> nn.Module:
    """A copy of the model with what the removed groups write zeroed: columns of o_proj and down_proj."""
    groups = _checked(model, keep)
    masked = copy.deepcopy(model)
    removed = {(layer, kind): np.flatnonzero(~keep[index]) for layer, kind, index in groups.blocks()}
    for layer, kinds in enumerate(block_parts(masked)):
        for kind, members in kinds.items():
            for part, linear in members:
                if part.axis == 1:
                    columns = linear.weight.view(linear.weight.shape[0], -1, part.width)
                    columns[:, removed[layer, kind]] = 0
    return masked


def _checked(model: nn.Module, keep: np.ndarray) -> Groups:
    groups = discover(model)
    if keep.shape != (len(groups),) or keep.dtype != bool:
        raise SaapError(f"keep must be bool ({len(groups)},), got {keep.dtype} {keep.shape}")
    for layer, kind, index in groups.blocks():
        if not keep[index].any():
            raise SaapError(f"the plan leaves layer {layer} without {kind}")
    return groups
