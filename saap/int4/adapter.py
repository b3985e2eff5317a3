"""The pooled low-rank adapter over group-wise int4, and its exact merge (SAAP eq. 12, QA-LoRA)."""

import math
from collections.abc import Callable

import torch
from torch import nn

from saap.models.modeling_groupwise import GroupwiseLinear


class PooledAdapter(nn.Module):
    """y = x·Ŵ + s·(pool(x)·A)·B: x is summed within each group of inputs, so the update is constant on a group.

    base: the frozen int4 layer, L = ⌈in/group_size⌉ groups. a (rank, L), b (out, rank), zero at first; s = alpha/rank.
    A·B is multiplied out first: it has only out × L entries, and then one product with pool(x) does, with only pool(x)
    to keep for the backward pass.
    """

    def __init__(self, base: GroupwiseLinear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        scale: torch.Tensor = base.scale  # type: ignore[assignment]
        self.a = nn.Parameter(torch.empty(rank, scale.shape[1], device=scale.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=scale.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def update(self) -> torch.Tensor:
        """s·B·A, float32 (out, groups): what the zeros are to change by."""
        with torch.autocast(self.a.device.type, enabled=False):
            return self.scaling * (self.b.float() @ self.a.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x, self.update())

    @torch.no_grad()
    def merged(self, dtype: torch.dtype = torch.float16) -> GroupwiseLinear:
        """The int4 layer with b'[o, g] = b[o, g] + s·(B·A)[o, g]: the same function, with no adapter left.

        The zeros stay floats; `dtype` is how they are kept (checkpoints: float16).
        """
        zero: torch.Tensor = self.base.zero  # type: ignore[assignment]
        self.base.zero = (zero.float() + self.update()).to(dtype)
        return self.base


def add_adapters(
    model: nn.Module, rank: int, alpha: float, wanted: Callable[[str], bool] = lambda path: True
) -> list[nn.Parameter]:
    """Put an adapter over every wanted GroupwiseLinear, in place; everything else is frozen.

    Returns what is to be trained.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear) and wanted(name):
            adapter = PooledAdapter(module, rank, alpha)
            model.set_submodule(name, adapter)
            trained += [adapter.a, adapter.b]
    return trained


def merge_adapters(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Merge every PooledAdapter into the zeros of its int4 layer, in place; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PooledAdapter):
            model.set_submodule(name, module.merged(dtype))
    return model
