"""Coupled groups: what must be removed together (method: SAAP arXiv 2412.15127 §III, LLM-Pruner arXiv 2305.11627)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.families import Experts, Part, family_of

KINDS = ("attention", "mlp")
HEADS = ("kv", "query")


class _Rules:
    __slots__ = ("_fewest", "even")  # beside the columns, which `vars` gives


@dataclass(frozen=True)
class Groups(_Rules):
    """The N coupled groups of a model, ordered by layer, kind (attention before mlp) and unit.

    layer int32 (N,); kind str (N,), one of KINDS; unit int32 (N,), its number within (layer, kind): the KV head with
    its query heads (or the query head, see `choose_heads`), or the MLP channel; parameters int64 (N,), the weights (and
    biases) that go when the group goes.

    In a mixture of E experts of I channels kind 'expert' stands between the two, and channel j of expert e is unit
    e·I + j of kind 'mlp'. An expert's parameters are those beside its channels, which go with it: its router row.
    """

    layer: np.ndarray
    kind: np.ndarray
    unit: np.ndarray
    parameters: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    def stretches(self, layer: int, kind: str) -> int:
        """The number of equal stretches that the groups of (layer, kind) stand in; each must keep as many as the
        others.

        More than 1 for query heads, because a checkpoint has one number of them for all KV heads.
        """
        return int(getattr(self, "even", {}).get((layer, kind), 1))

    def fewest(self, layer: int) -> int:
        """How many experts a layer needs: as many as the router picks for a token."""
        return int(getattr(self, "_fewest", {}).get(layer, 1))

    @property
    def costs(self) -> np.ndarray:
        """int64 (N,): parameters, and for an expert those of its channels too."""
        costs = self.parameters.copy()
        for layer, kind, index in self.structures():
            if kind == "mlp" and self.stretches(layer, kind) > 1:
                experts = (self.layer == layer) & (self.kind == "expert")
                costs[experts] += self.parameters[index].reshape(self.stretches(layer, kind), -1).sum(1)
        return costs

    def scopes(self, scope: str) -> np.ndarray:
        """int64 (N,): groups with the same number share a scope: 'global', 'kind', 'layer_kind' or 'group'."""
        kind = (self.kind == "mlp").astype(np.int64)
        labels = {
            "global": np.zeros(len(self), np.int64),
            "kind": kind,
            "layer_kind": self.layer.astype(np.int64) * len(KINDS) + kind,
            "group": np.arange(len(self)),
        }
        return np.unique(labels[scope], return_inverse=True)[1]

    def structures(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """(layer, kind, indices of its groups) for every layer and kind, in order."""
        edges = np.flatnonzero((np.diff(self.layer) != 0) | (self.kind[1:] != self.kind[:-1])) + 1
        for index in np.split(np.arange(len(self)), edges):
            yield int(self.layer[index[0]]), str(self.kind[index[0]]), index


def layer_parts(model: nn.Module) -> list[dict[str, list[tuple[Part, nn.Linear]]]]:
    """For each layer: kind → [(part, its linear layer)]. Raises SaapError for an unknown family."""
    family = family_of(model.config)
    return [
        {
            kind: [(part, layer.get_submodule(part.matrix)) for part in parts]  # type: ignore[misc]
            for kind, parts in family.parts(config).items()
        }
        for layer, config in zip(family.layers(model), family.layer_configs(model), strict=True)
    ]


def group_matrices(model: nn.Module) -> Iterator[tuple[int, str, Part, nn.Linear]]:
    """(layer, kind, part, linear) of every matrix that belongs to groups, in the order of `discover`.

    Raises SaapError for a mixture of experts, whose groups are more than the matrices that are linear layers.
    """
    if isinstance(family_of(model.config), Experts):
        raise SaapError(
            f"experts of a {model.config.model_type} are ranked by criterion saap_plus (with cuts = [], take_"  # type: ignore[union-attr]
            "heads = 'pooled') or reap, and not refitted: set prune.compensation to 'none'"
        )
    for layer, kinds in enumerate(layer_parts(model)):
        for kind, members in kinds.items():
            for part, linear in members:
                yield layer, kind, part, linear


def discover(model: nn.Module) -> Groups:
    """The coupled groups of a model (also one on the meta device). Raises SaapError for an unknown family."""
    family = family_of(model.config)
    layers, kinds, units, parameters = [], [], [], []
    even: dict[tuple[int, str], int] = {}
    fewest: dict[int, int] = {}
    configs = family.layer_configs(model)
    for layer, (config, parts) in enumerate(zip(configs, layer_parts(model), strict=True)):
        sizes: dict[str, int] = {}
        if isinstance(family, Experts):
            sizes = family.sizes(family.layers(model)[layer])
            fewest[layer] = config.num_experts_per_tok
        for kind, count in family.units(config).items():
            size = sizes.get(kind, 0)
            for part, linear in parts.get(kind, []):
                size += part.width * linear.weight.shape[1 - part.axis]
                if part.axis == 0 and linear.bias is not None:
                    size += part.width
            vectors = [*family.joint_norms(config).get(kind, []), *family.vectors(config).get(kind, [])]
            size += sum(part.width for part in vectors)
            even[layer, kind] = family.stretches(config).get(kind, 1)
            layers.append(np.full(count, layer, np.int32))
            kinds.append(np.full(count, kind))
            units.append(np.arange(count, dtype=np.int32))
            parameters.append(np.full(count, size, np.int64))
    groups = Groups(*(np.concatenate(a) for a in (layers, kinds, units, parameters)))
    object.__setattr__(groups, "even", even)
    object.__setattr__(groups, "_fewest", fewest)
    return groups


def choose_heads(model: nn.Module, heads: str) -> None:
    """What a group of attention is in this dense model: "kv", a KV head with its query heads; "query", a query head.

    Query heads go evenly under each KV head, whose k and v stay. A model with one KV head a layer is always taken by
    query heads; where each query head has a KV head of its own the two are the same. A pruned model stays with the
    groups it was pruned by. Raises SaapError for another word.
    """
    if heads not in HEADS:
        raise SaapError(f"heads must be one of {HEADS}, got '{heads}'")
    if not hasattr(model.config, "groupwise"):
        model.config.heads = heads  # type: ignore[attr-defined]


def weight_of(linear: nn.Linear, device: torch.device | None = None) -> torch.Tensor:
    """Its weight; one that accelerate keeps on the CPU or on disk is fetched from there (to `device`, if given)."""
    weight: torch.Tensor = linear.weight.detach()
    if weight.is_meta and hasattr(linear, "_hf_hook"):
        weight = linear._hf_hook.weights_map["weight"]  # type: ignore[union-attr, index]
    return weight if device is None else weight.to(device)


@torch.no_grad()
def weight_norms(model: nn.Module) -> np.ndarray:
    """float64 (N,): ‖W‖², the sum of squares of all weights (biases apart) of each coupled group."""
    norms = []
    for parts in layer_parts(model):
        for kind in parts:
            total: torch.Tensor | None = None
            for part, linear in parts[kind]:
                square = weight_of(linear).float().square().sum(1 - part.axis, dtype=torch.float64)
                square = part.by_unit(square).sum(1)
                total = square if total is None else total + square
            norms.append(total.cpu().numpy())  # type: ignore[union-attr]
    return np.concatenate(norms)
