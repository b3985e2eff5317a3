"""RMS norms, gated MLPs and attention that keep less for a backward pass. The weights must be frozen.

transformers' own keep what each of their operations read: in half precision a norm keeps its input a second time in
float32, an MLP the activation beside its input, attention its probabilities twice. These keep their inputs (attention:
its probabilities too) and make the rest again. Results differ from the plain ones by rounding only.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "saap_lean"  # its name in `set_attn_implementation`


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """While open, every frozen RMS norm and gated MLP of the model is one of these.

    Only modules that compute just what these do: each class is tried on random numbers. Modules whose `forward`
    somebody else has replaced stay as they are, so those of a model that accelerate has spread do.
    """
    with ExitStack() as stack:
        for module in model.modules():
            forward = None if "forward" in vars(module) else _replacement(module)
            if forward is not None:
                module.forward = forward
                stack.callback(_give_back, module, forward)
        yield


def _give_back(module: nn.Module, forward: Callable) -> None:
    if vars(module).get("forward") is forward:
        del module.forward


def fastest_attention(model: Any, device: str, precision: torch.dtype, length: int, at_most: int) -> str:
    """The attention implementation for a forward and a backward pass over sequences of `length` tokens.

    On a CPU in bfloat16 torch's fused one takes four times as long as plain products. But these keep the probabilities,
    the square of the length: at_most says up to where.
    """
    own = str(model.config._attn_implementation)
    fused = own == "sdpa" and device == "cpu" and precision == torch.bfloat16
    return ATTENTION if fused and length <= at_most else own


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
    node: Any = x.grad_fn
    make = getattr(node, "make", None)
    return None if make is None else lambda: make(*node.saved_tensors).detach()  # without x, which is to go


class _Norm(torch.autograd.Function):
    """y = x·r·w, r = 1/√(mean(x²) + eps); ∂L/∂x = r·g − x·r³·mean(g·x), with g = w·∂L/∂y. All in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        narrow = x.float() if x.dtype == torch.float64 else x
        r = torch.linalg.vector_norm(narrow, dim=-1, keepdim=True, dtype=torch.float32)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        ctx.make = _normed
        return _normed(x, r, weight)

    @staticmethod
    @once_differentiable
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
        return ctx.make(gate, up)

    @staticmethod
    @once_differentiable
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
    @once_differentiable
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
    kind: Any = type(module)
    if kind.__name__.endswith("RMSNorm"):
        weight = getattr(module, "weight", None)
        if weight is None or weight.requires_grad or weight.is_meta or weight.ndim != 1 or _eps(module) is None:
            return None
        offset = _offset(kind, _eps(module))
        return None if offset is None else partial(_norm, module, offset)
    if all(hasattr(module, name) for name in (*PROJECTIONS, "act_fn")):
        return partial(_gated, module) if _is_gated(kind) else None
    return None


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _eps(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm(module: Any, offset: float, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight.float()
    found: torch.Tensor = _Norm.apply(x, weight + offset if offset else weight, _eps(module))
    return found


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    act = getattr(module.act_fn, "forward", module.act_fn)  # no hooks: it is called once more in the backward pass
    found: torch.Tensor = module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x), act))
    return found


@cache
def _offset(kind: Any, eps: float) -> float | None:
    """What a class of norms adds to its weight, 0 or 1; None if it computes something else."""
    one = _bare(kind, weight=nn.Parameter(_random(WIDTH)), eps=eps, variance_epsilon=eps)
    return next((offset for offset in (0.0, 1.0) if _same(one, partial(_norm, one, offset))), None)


@cache
def _is_gated(kind: Any) -> bool:
    """Whether a class of MLPs computes down(act(gate(x))·up(x))."""
    with torch.random.fork_rng(devices=[]):  # what is drawn next must not depend on it
        linears = {name: nn.Linear(WIDTH, WIDTH, device="cpu") for name in PROJECTIONS}
    one = _bare(kind, **linears, act_fn=nn.Tanh())
    return _same(one, partial(_gated, one))


WIDTH = 8  # of what a class is tried on


def _bare(kind: Any, **members: Any) -> Any:
    """An instance with these members alone."""
    one = kind.__new__(kind)
    nn.Module.__init__(one)
    for name, member in members.items():
        setattr(one, name, member)
    return one


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


@torch.no_grad()
def _same(module: Any, other: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether both give the same for random numbers, but for rounding; not if the module lacks something for that."""
    x = _random(4, WIDTH)
    try:
        theirs = module(x)
    except AttributeError:
        return False
    return bool((theirs - other(x)).norm() <= 1e-5 * theirs.norm())
