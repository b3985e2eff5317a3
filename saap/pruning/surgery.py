"""A plan applied to a model, by slicing its tensors, or by masking them, against which tests compare the slices."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.checkpoint import complete
from saap.models.families import Experts, Part, family_of
from saap.models.groups import Groups, discover, layer_parts
from saap.models.offload import is_offloaded


def widths(model: nn.Module, groups: Groups, keep: np.ndarray) -> dict[int, dict[str, Any]]:
    """layer → the configuration fields of the pruned layer, e.g. num_attention_heads, intermediate_size."""
    family = family_of(model.config)
    kept: dict[int, dict[str, list[int]]] = {}
    for layer, kind, index in groups.structures():
        kept.setdefault(layer, {})[kind] = np.flatnonzero(keep[index]).tolist()
    return {layer: family.widths(config, kept[layer]) for layer, config in enumerate(family.layer_configs(model))}


@torch.no_grad()
def prune(model: nn.Module, keep: np.ndarray) -> nn.Module:
    """A smaller model that holds only the groups with keep = True. The given model stays as it is.

    keep is bool (N,), columns in the order of `discover(model)`. Weights keep their dtype and device.
    Raises SaapError when keep does not fit the model or empties a layer, and for weights away from their device. A
    model without weights (on the meta device) gives one without.
    """
    if is_offloaded(model) and any(hasattr(module, "_hf_hook") for module in model.modules()):  # accelerate's
        raise SaapError("prune slices weights, and needs a model whose weights are all on its device")
    groups = _checked(model, keep)
    rows = {(layer, kind): np.flatnonzero(keep[index]) for layer, kind, index in groups.structures()}
    whole = model.state_dict()
    state = dict(whole)
    names = {id(module): name for name, module in model.named_modules()}
    for layer, kinds in enumerate(layer_parts(model)):
        for kind, members in kinds.items():
            for part, linear in members:
                kept = torch.from_numpy(rows[layer, kind]).to(linear.weight.device)
                index = part.staying(kept, linear.weight.shape[part.axis])
                name = names[id(linear)]
                state[f"{name}.weight"] = linear.weight.index_select(part.axis, index)
                if part.axis == 0 and linear.bias is not None:
                    state[f"{name}.bias"] = linear.bias[index]
    family = family_of(model.config)
    for layer, (module, config) in enumerate(zip(family.layers(model), family.layer_configs(model), strict=True)):
        for kind, parts in family.vectors(config).items():
            for part in parts:
                vector = module.get_parameter(part.matrix)
                kept = torch.from_numpy(rows[layer, kind]).to(vector.device)
                state[f"{names[id(module)]}.{part.matrix}"] = vector[part.staying(kept, len(vector))]
    if isinstance(family, Experts):
        for layer in family.mixtures(model):
            module = family.layers(model)[layer]
            state |= {f"{names[id(module)]}.{n}": t for n, t in family.cut(module, *_experts(rows, layer)).items()}
    for layer, kind, part, norm in _joint_norms(model):
        kept = torch.from_numpy(rows[layer, kind]).to(norm.weight.device)
        state[f"{names[id(norm)]}.weight"] = norm.weight[part.staying(kept, len(norm.weight))]
    with torch.device("meta"):
        small = family_of(model.config).uneven(model.config, widths(model, groups, keep))
    for name, tensor in state.items():
        if tensor is whole[name] and not name.endswith("inv_freq"):  # slices are copies already
            state[name] = tensor.clone()
    small.load_state_dict(state, assign=True)
    return complete(small, model)


@torch.no_grad()
def mask(model: nn.Module, keep: np.ndarray) -> nn.Module:
    """A copy of the model with what the removed groups write zeroed: columns of o_proj and down_proj.

    A norm over all heads together (OLMo 2's of q and of k) takes its mean over the heads that are there. So that it
    does so here too, it gets zeros from removed heads, and its weights and eps are corrected for the greater count.
    """
    groups = _checked(model, keep)
    if isinstance(family_of(model.config), Experts):
        raise SaapError("experts cannot be masked: the router would still send tokens to them")
    masked = copy.deepcopy(model)
    removed = {(layer, kind): np.flatnonzero(~keep[index]) for layer, kind, index in groups.structures()}
    for layer, kinds in enumerate(layer_parts(masked)):
        for kind, members in kinds.items():
            for part, linear in members:
                if part.axis == 1:
                    columns = linear.weight.view(linear.weight.shape[0], -1, part.width)
                    columns[:, removed[layer, kind]] = 0
    layers = family_of(model.config).layers(masked)
    for layer, kind, part, norm in _joint_norms(masked):
        gone = torch.from_numpy(removed[layer, kind]).to(norm.weight.device)
        projection: Any = layers[layer].get_submodule(part.matrix.replace("_norm", "_proj"))
        for tensor in (projection.weight, projection.bias):
            if tensor is not None:
                tensor.view(-1, part.width, *tensor.shape[1:])[gone] = 0
        share = 1 - len(gone) * part.width / len(norm.weight)
        norm.weight *= share**0.5
        norm.variance_epsilon *= share
    return masked


def _experts(rows: dict[tuple[int, str], np.ndarray], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts of a layer stay, (n,), and which channels of each, (n, c)."""
    experts, channels = rows[layer, "expert"], rows[layer, "mlp"]
    width = len(channels) // len(experts)
    own = channels.reshape(len(experts), width)
    return torch.from_numpy(experts), torch.from_numpy(own)


def _joint_norms(model: nn.Module) -> Iterator[tuple[int, str, Part, Any]]:
    """(layer, kind, part, norm) of the norms that run over all groups of a kind together."""
    family = family_of(model.config)
    for layer, (module, config) in enumerate(zip(family.layers(model), family.layer_configs(model), strict=True)):
        for kind, parts in family.joint_norms(config).items():
            for part in parts:
                yield layer, kind, part, module.get_submodule(part.matrix)


def _checked(model: nn.Module, keep: np.ndarray) -> Groups:
    groups = discover(model)
    if keep.shape != (len(groups),) or keep.dtype != bool:
        raise SaapError(f"keep must be bool ({len(groups)},), got {keep.dtype} {keep.shape}")
    mixtures = groups.mixtures()
    for layer, kind, index in groups.structures():
        if not keep[index].any():
            raise SaapError(f"the plan leaves layer {layer} without {kind}")
        each = keep[index].reshape(groups.stretches(layer, kind), -1).sum(1)
        if kind == "expert" and each[0] < groups.fewest(layer):
            raise SaapError(f"the plan leaves layer {layer} {each[0]} experts, its router picks {groups.fewest(layer)}")
        if kind == "mlp" and layer in mixtures:
            experts, _ = mixtures[layer]
            if each[~keep[experts]].any():
                raise SaapError(f"the plan keeps channels of experts of layer {layer} that go")
            each = each[keep[experts]]
        if len(set(each)) > 1:
            raise SaapError(
                f"the plan leaves layer {layer} with different numbers of {kind} groups where all must agree"
            )
    return groups
