"""What the channels of one matrix sum to in s = W ⊙ ∂L/∂W, sample by sample; ∂L/∂W itself is made tile by tile."""

import torch

from saap.models.products import product

try:
    from saap.scoring import salience_triton
except ImportError:  # torch's builds for a CPU come without Triton
    salience_triton = None  # type: ignore[assignment]

TILE = 1 << 20  # elements of ∂L/∂W at a time: 4 MB of float32 fit a CPU's caches and do not fragment its memory


def channel_sums(
    weight: torch.Tensor,
    delta: torch.Tensor,
    x: torch.Tensor,
    axis: int,
    *,
    hessian: str = "none",
    scale: float = 1.0,
    work: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ s (or Σ s − ½s² with hessian='fisher') and Σ |s − ½s²| of each row (axis 0) or column (axis 1), s = W ⊙ δᵀx.

    Args:
        weight, delta, x: (out, in), (B, T, out) and (B, T, in), of any float dtype; all is summed in float32.
        scale: what the loss, and so delta, was multiplied by; a power of two, so that undoing it is exact.
        work: float32 (TILE,) to work in, made anew if not given.

    Returns:
        float32 (2, B, out) or (2, B, in).
    """
    if weight.is_cuda and salience_triton is not None:
        return salience_triton.channel_sums(weight, delta, x, axis, hessian == "fisher", scale)
    delta, x = delta.float() / scale if scale != 1 else delta.float(), x.float()
    samples, channels, across = len(delta), weight.shape[axis], weight.shape[1 - axis]
    step = max(1, TILE // across)
    if work is None:
        work = torch.empty(min(step, channels) * across, device=weight.device)
    sums = torch.empty(2, samples, channels, device=weight.device)
    for start in range(0, channels, step):
        tile = slice(start, start + step)
        rows, columns = (tile, slice(None)) if axis == 0 else (slice(None), tile)
        part = weight[rows, columns]
        second = work[: part.numel()].view(part.shape)
        for b in range(samples):
            s = product(delta[b, :, rows].T, x[b, :, columns].T).mul_(part)
            torch.addcmul(s, s, s, value=-0.5, out=second)
            torch.sum(s if hessian == "none" else second, 1 - axis, out=sums[0, b, tile])
            # faster than a norm of order 1, which does not vectorise
            torch.sum(second.abs_(), 1 - axis, out=sums[1, b, tile])
    return sums
