"""Logits of final states; the cross-entropy of next tokens and its gradient, a part of the vocabulary at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from saap.models.families import family_of
from saap.models.products import product

LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}  # at a time: 4 MB of float32 on a CPU, to fit its caches; 64 MB on a GPU


@contextmanager
def rows_for_the_head(model: Any) -> Iterator[None]:
    """While open, the head gets its states one behind the other in memory.

    The states of the last place of several rows (`logits_to_keep`) are not, and then torch multiplies each row by a
    copy of a frozen weight: as many copies as rows, at once, and on a CPU in bfloat16 a hundred times the seconds.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def logits_of(model: Any, states: torch.Tensor) -> torch.Tensor:
    """float32 (…, V), from final states (…, H) of a causal model of a known family; scaled and capped."""
    scale, cap = family_of(model.config).logits(model.config)
    found: torch.Tensor = model.get_output_embeddings()(states).float() * scale
    return cap * torch.tanh(found / cap) if cap else found


@torch.no_grad()
def cross_entropy(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: float = 1.0,
    cap: float | None = None,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log softmax(l)[target] of each token, and factor·∂/∂hidden of their sum: factor·scale·(softmax − one-hot)·W.

    l = scale·(hidden·Wᵀ + bias); with a cap c the logits are c·tanh(l / c), and each term of the gradient is multiplied
    by the slope 1 − tanh².

    A part of the vocabulary at a time, so that the head is read once; the sums of e^(logit − highest so far) are
    carried along as in flash attention. The target is left out of them: with R the sum over the others and E = e^logit
    of the target, softmax − 1 there is −R / (R + E), which does not cancel.

    Args:
        weight, bias: (V, H), (V,) of the head; a weight of another dtype than `hidden` is converted part by part.
        hidden, targets: (tokens, H), and int64 (tokens,).

    Returns:
        float32 (tokens,) and (tokens, H).
    """
    dtype = hidden.dtype
    if scale != 1:
        hidden = hidden * scale
    wanted = weight[targets].to(dtype).float()
    own = (hidden.float() * wanted).sum(-1, keepdim=True)
    if bias is not None:
        own += bias[targets, None] * scale
    own_slope = torch.ones(())
    if cap:
        own = cap * torch.tanh(own / cap)
        own_slope = 1 - (own / cap).square()
    highest, rest = own.clone(), torch.zeros_like(own)
    total = torch.zeros_like(hidden, dtype=torch.float32)
    step = max(1, LOGITS[hidden.device.type] // len(targets))
    for start in range(0, len(weight), step):
        part = weight[start : start + step].to(dtype)
        logits = product(hidden, part, None if bias is None else scale * bias[start : start + step].to(dtype)).float()
        if cap:
            logits = torch.tanh(logits / cap).mul_(cap)
            slope = 1 - (logits / cap).square()
        before, highest = highest, torch.maximum(highest, logits.amax(-1, keepdim=True))
        logits.sub_(highest).exp_()
        here = ((targets >= start) & (targets < start + step)).nonzero().squeeze(1)
        logits[here, targets[here] - start] = 0
        shrink = (before - highest).exp_()
        rest.mul_(shrink).add_(logits.sum(-1, keepdim=True))
        total.mul_(shrink).add_(product((logits.mul_(slope) if cap else logits).to(dtype), part.T))
    whole = rest + (own - highest).exp_()
    gradient = total.addcmul_(rest * own_slope, wanted, value=-1).mul_(factor * scale / whole)
    return (highest - own + whole.log()).squeeze(-1), gradient
