"""float32 matrix products on x86 CPUs by the faster of two libraries: oneDNN, or MKL, which PyTorch uses.

Which one is faster depends on the processor: on an AMD Zen 5 oneDNN is more than twice as fast, on others they are
equal. So it is measured, once a process: in the processor's time, so that other work on the machine does not decide it,
since the two round differently and what a run finds should not depend on that.
"""

import platform
import time
from collections.abc import Callable
from functools import lru_cache
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


def by_onednn() -> bool:
    """Whether `product` asks oneDNN in this process, with the threads it has now."""
    return THERE and _onednn_is_faster(torch.get_num_threads())


@lru_cache
def _onednn_is_faster(threads: int) -> bool:
    """Whether oneDNN is faster by a tenth: the best of ten products each of a linear layer's shape, 0.1 s in all."""
    a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
    taken = {F.linear: float("inf"), _onednn: float("inf")}
    with torch.no_grad():
        for _ in range(11):  # one more, as each side's first call sets it up
            for multiply in taken:
                start = time.process_time()
                multiply(a, b)
                taken[multiply] = min(taken[multiply], time.process_time() - start)
    return taken[_onednn] < 0.9 * taken[F.linear]


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
