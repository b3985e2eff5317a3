"""float32 matrix products on x86 CPUs by oneDNN. PyTorch asks MKL for them, which is half as fast on an AMD Zen 5."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

THERE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile emits for linear layers
)


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a·bᵀ + bias for a (…, k) and b (n, k). Other dtypes and devices: as PyTorch does it."""
    if THERE and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return F.linear(a, b, bias)


def _dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy: contiguous or the transpose of that. Of other strides oneDNN makes its slowest loop."""
    if t.is_contiguous() or t.mT.is_contiguous():
        return t
    return t.mT.contiguous().mT if t.ndim == 2 and t.stride(0) == 1 else t.contiguous()


class LinearsByOneDNN(TorchFunctionMode):
    """While open, linear layers use `product`, forward and backward. Their weights get no gradients."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            return _Linear.apply(*args)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(delta, weight.T), None, None
