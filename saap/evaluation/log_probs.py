"""Log-probabilities of given tokens, with the logits made a part of the vocabulary at a time."""

from typing import Any

import torch

from saap.errors import not_finite
from saap.models.families import family_of
from saap.models.products import product

LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}  # at a time: 4 MB of float32 on a CPU, to fit its caches; 256 MB on a GPU


@torch.no_grad()
def log_probs(
    model: Any, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits of hidden[row])[token] for each of K pairs (row, token), and whether no token is likelier.

    Args:
        model: a causal language model of a known family.
        hidden: (N, H), last states of `model.base_model`; each is multiplied once, however many pairs ask for it.
        rows, tokens: int64 (K,).

    Returns:
        float32 (K,) and bool (K,), on the head's device. The sums are in float32 whatever the logits' dtype.
        Of equal logits the first is the likeliest, as argmax has it. Raises SaapError for one that is not a number.

    With m the highest logit so far and Z = Σ e^(logit − m), a further part of the vocabulary updates both, as in flash
    attention.
    """
    head, (scale, cap) = model.get_output_embeddings(), family_of(model.config).logits(model.config)
    weight, bias = head.weight, head.bias
    hidden, rows, tokens = hidden.to(weight.device), rows.to(weight.device), tokens.to(weight.device)
    highest = torch.full((len(hidden), 1), -torch.inf, device=weight.device)
    total, likeliest = torch.zeros_like(highest), torch.zeros_like(highest, dtype=torch.long)
    own = torch.empty(len(rows), device=weight.device)
    step = max(1, LOGITS[weight.device.type] // len(hidden))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        logits = product(hidden, weight[part], None if bias is None else bias[part]).float()
        if scale != 1:
            logits.mul_(scale)
        if cap:
            logits.div_(cap).tanh_().mul_(cap)
        here = ((tokens >= start) & (tokens < start + step)).nonzero().squeeze(1)
        own[here] = logits[rows[here], tokens[here] - start]
        best, place = logits.max(-1, keepdim=True)
        likeliest = torch.where(best > highest, place + start, likeliest)
        before, highest = highest, torch.maximum(highest, best)
        weights = logits.sub_(highest).exp_()
        total.mul_((before - highest).exp_()).add_(weights.sum(-1, keepdim=True))
    found = own - (highest + total.log()).squeeze(1)[rows]
    if found.isnan().any():
        raise not_finite("a log-probability", model)
    return found, likeliest.squeeze(1)[rows] == tokens
