"""What the rest of the library needs to know about an architecture."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """One matrix (or vector) of a coupled group, and what each unit owns of its rows (axis 0) or columns (axis 1).

    The axis is made of stretches, one after another, then `rest` rows that belong to no unit. In a stretch of width w
    unit u owns u·w … (u+1)·w − 1. Most matrices have one stretch; one that stacks q, k and v has three.
    """

    matrix: str  # path inside the layer
    axis: int
    stretches: tuple[int, ...]
    rest: int = 0

    @property
    def width(self) -> int:
        """Rows or columns of one unit."""
        return sum(self.stretches)

    def by_unit(self, channels: torch.Tensor) -> torch.Tensor:
        """One value for each row or column, (channels,) → (units, width)."""
        units = (len(channels) - self.rest) // self.width
        pieces = channels[: units * self.width].split([units * width for width in self.stretches])
        return torch.cat([piece.view(units, -1) for piece in pieces], 1)

    def staying(self, kept: torch.Tensor, channels: int) -> torch.Tensor:
        """Numbers of the rows or columns, of `channels`, that stay with the units `kept`, int64, ascending."""
        units, start, found = (channels - self.rest) // self.width, 0, []
        for width in self.stretches:
            found.append((start + kept[:, None] * width + torch.arange(width, device=kept.device)).flatten())
            start += units * width
        return torch.cat([*found, torch.arange(start, channels, device=kept.device)])


class Family(ABC):
    """One architecture: where its layers are, what is coupled in them, and how a smaller one is built.

    `config` is always the configuration of *one layer* (its own widths), as `layer_configs` gives it.
    """

    model_types: tuple[str, ...]
    int4 = False  # whether the class of `uneven` understands `config.groupwise`
    rotary = True  # whether mask and `position_ids` say what a token sees, and where it stands; with ALiBi they do not
    post_norm = False  # whether a norm stands between an output matrix and the residual stream

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in order."""

    @abstractmethod
    def parts(self, config: Any) -> dict[str, list[Part]]:
        """kind → the matrices whose slices go together."""

    @abstractmethod
    def units(self, config: Any) -> dict[str, int]:
        """kind → number of coupled groups in the layer."""

    @abstractmethod
    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        """Configuration fields of a layer that keeps the groups `kept[kind]`, ascending numbers below `units`."""

    @abstractmethod
    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        """An uninitialised model with its own widths in each layer; `config` is the dense model's."""

    def joint_norms(self, config: Any) -> dict[str, list[Part]]:
        """kind → norms whose mean runs over all groups of the kind together; their weights go with the groups."""
        return {}

    def vectors(self, config: Any) -> dict[str, list[Part]]:
        """kind → other vectors that go with the groups: paths of parameters in the layer."""
        return {}

    def stretches(self, config: Any) -> dict[str, int]:
        """kind → how many equal stretches its groups stand in, where each must keep as many as the others."""
        return {}

    def residual(self, config: Any) -> float:
        """What the output of attention and MLP is multiplied with before it joins the residual stream."""
        return 1.0

    def logits(self, config: Any) -> tuple[float, float | None]:
        """(scale, cap): the logits of the model are scale·head(x), and with a cap c then c·tanh(logits / c)."""
        return 1.0, None

    def layer_configs(self, model: nn.Module) -> list[Any]:
        return list(model.config.per_layer_config)  # type: ignore[union-attr, arg-type]
