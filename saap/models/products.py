"""float32 matrix products on x86 CPUs by the faster of two libraries: oneDNN, or MKL, which PyTorch uses.

On AMD's processors with AVX-512 oneDNN is at least as fast, on a Zen 5 more than twice; on all others PyTorch's own
choice stays. The two round differently, so the kind of processor decides and no measurement: where they are close,
noise would let two processes of one sweep differ in the last bits.
"""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
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
    """a·bᵀ + bias for a (…, k) and b (n, k). Other dtypes and devices, and no rows: as PyTorch does it."""
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and a.numel() and by_onednn():
        return _onednn(a, b, bias)
    return F.linear(a, b, bias)


@cache
def by_onednn() -> bool:
    """Whether `product` asks oneDNN on this processor."""
    return THERE and torch.backends.cpu.get_cpu_capability() == "AVX512" and _made_by_amd()


def _made_by_amd() -> bool:
    known = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (known.read_text() if known.is_file() else platform.processor())


def _onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")


def _dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a contiguous copy. Also t when it is the transpose of that: other strides mean oneDNN's slowest loop."""
    if t.is_contiguous() or t.mT.is_contiguous():
        return t
    return t.mT.contiguous().mT if t.ndim == 2 and t.stride(0) == 1 else t.contiguous()


class FastLinears(TorchFunctionMode):
    """While open, linear layers use `product`, forward and backward. Their weights get no gradients.

    Does nothing where `product` would do as PyTorch does: a mode costs time at every operation.
    """

    def __enter__(self) -> "FastLinears":
        self._needed = by_onednn()
        if self._needed:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._needed:
            super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            return _Linear.apply(*args) if torch.is_grad_enabled() else product(*args)
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
