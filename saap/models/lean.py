"""RMS norms, gated MLPs and attention that keep less for a backward pass. The weights must be frozen.

transformers' own keep what each of their operations read: in half precision a norm keeps its input a second time in
float32, an MLP the activation beside its input, attention its probabilities twice. These keep their inputs (attention:
its probabilities too) and make the rest again. Results differ from the plain ones by rounding only.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "saap_lean"  # its name in `set_attn_implementation`
SHORT = 512  # tokens: ATTENTION keeps the square of the length


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """While open, every frozen RMS norm and gated MLP of the model is one of these.

    Only modules that compute just what these do: one of each class is tried on random numbers. Modules whose `forward`
    somebody else has replaced stay as they are, and so do those whose weights are not here (offload).
    """
    with ExitStack() as stack:
        for module in model.modules():
            forward = None if "forward" in vars(module) else _replacement(module)
            if forward is not None:
                module.forward = forward
                stack.callback(delattr, module, "forward")
        yield


def fastest_attention(model: Any, device: str, precision: torch.dtype, length: int) -> str:
    """The attention implementation for a forward and a backward pass over sequences of at most `length` tokens.

    On a CPU in bfloat16 torch's fused one takes four times as long as plain products.
    """
    own = str(model.config._attn_implementation)
    fused = own == "sdpa" and device == "cpu" and precision == torch.bfloat16
    return ATTENTION if fused and length <= SHORT else own


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """While open, the model has that attention implementation."""
    own = model.config._attn_implementation
    if implementation != own:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if implementation != own:
            model.set_attn_implementation(own)


def again(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Makes x again, what a norm or the gate of an MLP here gave, from what its backward pass keeps. None for others.

    Until that pass has gone through it.
    """
    make = getattr(x.grad_fn, "make", None)
    return None if make is None else lambda: make(*x.grad_fn.saved_tensors).detach()  # type: ignore[union-attr]


class _Norm(torch.autograd.Function):
    """y = x·r·w, r = 1/√(mean(x²) + eps); ∂L/∂x = r·g − x·r³·mean(g·x), with g = w·∂L/∂y. All in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        ctx.make = _normed
        return _normed(x, r, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, r, weight = ctx.saved_tensors
        wide, grad = x.float(), (grad * weight).float()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1).mul_(r.pow(3)).div_(-x.shape[-1])
        return grad.mul_(r).addcmul_(wide, along).to(x.dtype), None, None


def _normed(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * r).mul_(weight).to(x.dtype)


class _Gate(torch.autograd.Function):
    """y = act(gate)·up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable) -> torch.Tensor:
        ctx.act, ctx.make = act, lambda gate, up: act(gate) * up
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            own = gate.detach().requires_grad_()
            opened = ctx.act(own)
        (back,) = torch.autograd.grad(opened, own, grad * up)
        return back, grad * opened.detach(), None


class _Attention(torch.autograd.Function):
    """softmax(scaling·q·kᵀ + mask)·v for q (B, A, T, d), k and v (B, K, S, d), K a divisor of A."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        heads, dtype = q.shape[:3], v.dtype  # under autocast the rotary embeddings may have made q and k wider
        q = q.to(dtype).reshape(-1, q.shape[1] // k.shape[1] * q.shape[2], q.shape[3])
        k, v = k.to(dtype).flatten(0, 1), v.flatten(0, 1)
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.bmm(q, k.mT).view(*heads, -1).mul_(scaling)
            if mask is not None:
                scores.add_(mask.clamp_min(torch.finfo(dtype).min))  # float32's lowest is −∞ in bfloat16
            p = scores.softmax(-1).view(len(q), q.shape[1], -1)
            out = torch.bmm(p, v).view(*heads, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling, ctx.groups = scaling, heads[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        heads, grad = grad.shape[:3], grad.reshape(len(p), p.shape[1], -1)
        to_scores = torch.bmm(grad, v.mT)
        to_scores = torch.ops.aten._softmax_backward_data(to_scores, p, -1, p.dtype).mul_(ctx.scaling)
        to_k, to_v = torch.bmm(to_scores.mT, q), torch.bmm(p.mT, grad)
        by_head = (to.unflatten(0, (ctx.groups, -1)) for to in (to_k, to_v))
        return torch.bmm(to_scores, k).view(*heads, -1), *by_head, None, None


def _attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `ATTENTION` names. Where the scores have more to them (a cap, sinks, dropout), the family's own products."""
    if dropout or any(more.get(name) is not None for name in ("softcap", "s_aux")):
        plain = sys.modules[type(module).__module__].eager_attention_forward
        found: tuple[torch.Tensor, torch.Tensor | None] = plain(
            module, q, k, v, mask, scaling=scaling, dropout=dropout, **more
        )
        return found
    return _Attention.apply(q, k, v, mask, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def _replacement(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A lean `forward` of a module, or None."""
    kind = type(module)
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    if kind.__name__.endswith("RMSNorm"):
        weight = getattr(module, "weight", None)
        if weight is None or weight.requires_grad or weight.ndim != 1:
            return None
        if kind not in _OFFSETS:
            _OFFSETS[kind] = next((o for o in (0.0, 1.0) if _same(module, _norm(module, o), len(weight))), None)
        offset = _OFFSETS[kind]
        return None if offset is None else _norm(module, offset)
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn", "hidden_size")):
        if kind not in _GATED:
            _GATED[kind] = _same(module, partial(_gated, module), module.hidden_size)
        return partial(_gated, module) if _GATED[kind] else None
    return None


_OFFSETS: dict[type, float | None] = {}  # class of norms → what is added to the weight; None: another formula
_GATED: dict[type, bool] = {}  # class of MLPs → whether they are down(act(gate(x))·up(x))


def _norm(module: Any, offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 0.0)
    return lambda x: _Norm.apply(x, module.weight.float() + offset, eps)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x), module.act_fn))
    return found


@torch.no_grad()
def _same(module: Any, other: Callable[[torch.Tensor], torch.Tensor], width: int) -> bool:
    """Whether both give the same for random numbers, but for rounding."""
    some = next(module.parameters())
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(some.device, some.dtype)
    theirs, ours = module(x).float(), other(x).float()
    return bool((theirs - ours).norm() <= 4 * torch.finfo(some.dtype).eps * theirs.norm())
