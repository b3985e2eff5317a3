"""What the rest of the library needs to know of an architecture."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Part:
    """One matrix of a coupled group. Unit u owns rows (axis 0) or columns (axis 1) u·width … (u+1)·width − 1 of it."""

    matrix: str  # path inside the block
    axis: int
    width: int


class Family(ABC):
    """One architecture: where its blocks are, what is coupled in them, and how a smaller one is built.

    `config` is always the configuration of *one block* (its own widths), as `block_configs` gives it.
    """

    model_types: tuple[str, ...]
    int4 = False  # whether the class of `uneven` understands `config.groupwise`
    rotary = True  # whether `position_ids` say where a token stands; with ALiBi its place in the sequence does

    @abstractmethod
    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, in order."""

    @abstractmethod
    def parts(self, config: Any) -> dict[str, list[Part]]:
        """kind → the matrices whose slices go together."""

    @abstractmethod
    def units(self, config: Any) -> dict[str, int]:
        """kind → number of coupled groups in the block."""

    @abstractmethod
    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        """Configuration fields of a block that keeps the groups `kept[kind]`, ascending numbers below `units`."""

    @abstractmethod
    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        """An uninitialised model with its own widths in each block; `config` is the dense model's."""

    def block_configs(self, model: nn.Module) -> list[Any]:
        return list(model.config.per_layer_config)  # type: ignore[union-attr, arg-type]
