"""What a plan will weigh, known from shapes alone: no weight is read or made."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from saap.models.checkpoint import DTYPES
from saap.models.families import family_of
from saap.models.groups import Groups, layer_parts


class Footprint:
    """Parameters and bytes of a pruned model, as `size_of` counts them when it is made.

    model: the dense one, which may be on the meta device; dtype: of its weights when it is loaded, one of `DTYPES`.
    groupwise: {"bits": b, "group_size": G} or {"bits": b, "groups": L} for the bytes of the model that recovery makes,
    None for the float one. output_bias: whether every output matrix gets a bias (`add_mean_bias`).
    """

    def __init__(
        self,
        model: Any,
        groups: Groups,
        dtype: str = "float32",
        *,
        groupwise: Mapping[str, int] | None = None,
        output_bias: bool = False,
    ) -> None:
        self._groups, self._form, self._width = groups, groupwise, DTYPES[dtype].itemsize
        self._parts = layer_parts(model)
        parameters = {id(p): p.numel() for p in model.parameters()}
        buffers = {id(b): b for name, b in model.named_buffers() if not name.endswith("inv_freq")}
        self._count = sum(parameters.values())
        if output_bias:
            outputs = [m for layer in self._parts for own in layer.values() for part, m in own if part.axis == 1]
            self._count += sum(linear.out_features for linear in outputs if linear.bias is None)
        self._bytes = self._count * self._width
        for buffer in buffers.values():
            self._bytes += buffer.numel() * (self._width if buffer.is_floating_point() else buffer.element_size())
        if groupwise is not None:
            for layer in family_of(model.config).layers(model):
                for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                    self._bytes += self._saved(linear.out_features, linear.in_features)

    def parameters(self, keep: np.ndarray) -> int:
        """Of the model with the groups keep, bool (N,)."""
        return self._count - int(self._groups.parameters[~keep].sum())

    def weight_bytes(self, keep: np.ndarray) -> int:
        """What its parameters and buffers occupy as stored."""
        total = self._bytes - int(self._groups.parameters[~keep].sum()) * self._width
        if self._form is None:
            return total
        for layer, kind, index in self._groups.structures():
            gone = int((~keep[index]).sum())
            for part, linear in self._parts[layer].get(kind, []) if gone else ():
                out, width = linear.out_features, linear.in_features
                left = (out - gone * part.width, width) if part.axis == 0 else (out, width - gone * part.width)
                total += self._saved(*left) - self._saved(out, width)
        return total

    def _saved(self, out: int, width: int) -> int:
        """Bytes of a matrix (out, width) in codes, less those in floats."""
        assert self._form is not None
        group = self._form.get("group_size") or max(1, -(-width // self._form["groups"]))
        return out * (-(-width * self._form["bits"] // 8) + 4 * -(-width // group) - width * self._width)
