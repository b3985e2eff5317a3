"""How far a pruned model is from the dense one, in nats of the next token."""

from typing import Any

import numpy as np
import torch

from saap.models.logits import logits_of
from saap.models.offload import input_device
from saap.models.products import FastLinears

LOGITS = 1 << 23  # at a time: 32 MB of float32


@torch.no_grad()
def divergence(model: Any, small: Any, tokens: torch.Tensor, *, batch_size: int = 4) -> np.ndarray:
    """float64 (D,): mean KL(model ‖ small) of the next token over each sequence of tokens int64 (D, T), nats.

    batch_size: sequences at once. Changes speed and memory, not the result.
    """
    found = []
    model.eval()
    small.eval()
    with FastLinears():
        for batch in tokens.split(batch_size):
            ids = batch.to(input_device(model))
            theirs, own = (
                each.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1) for each in (model, small)
            )
            step = max(1, LOGITS // model.get_output_embeddings().out_features)
            parts = []
            for wanted, given in zip(theirs.split(step), own.split(step), strict=True):
                log_q, log_p = (logits_of(*pair).log_softmax(-1) for pair in ((model, wanted), (small, given)))
                parts.append((log_q.exp() * (log_q - log_p)).sum(-1))
            found.append(torch.cat(parts).view(batch.shape).double().mean(1).cpu())
    return torch.cat(found).numpy()
