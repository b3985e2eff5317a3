"""Calibration text that the dense model writes itself: no data is needed, and it is of every kind the model knows."""

from typing import Any

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.offload import input_device, is_offloaded
from saap.models.products import FastLinears
from saap.progress import tqdm
from saap.texts import leading_bos

AT_ONCE = 64  # sequences


@torch.no_grad()
def own_text(model: nn.Module, tokenizer: Any, *, count: int, length: int, seed: int) -> torch.Tensor:
    """`count` sequences that begin with any token and go on as the model's distribution has it, nothing cut off.

    Sequence i depends on the model, `seed` and i; rounding may turn a draw that falls between two tokens. A token drawn
    evenly from the vocabulary begins it (LLM-QAT, arXiv 2305.17888), without special tokens, and behind BOS where the
    tokenizer puts one; BOS is not returned.

    Returns:
        int64 (count, length).

    Raises:
        SaapError: weights away from their device, or logits that are not finite.
    """
    if is_offloaded(model):
        raise SaapError("own text needs a model whose weights are all on its device")
    model.eval()
    device = input_device(model)
    behind = torch.tensor(leading_bos(tokenizer), dtype=torch.int64)
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    # torch's generator would take 32 bits of a seed only
    draws = torch.from_numpy(np.stack([np.random.default_rng([seed, i]).random(length) for i in range(count)]))
    first = plain[(draws[:, :1] * len(plain)).long()]
    written = []
    with tqdm(total=count, desc="own text", unit="sequence") as bar, FastLinears():
        for draw, token in zip(draws.split(AT_ONCE), first.split(AT_ONCE), strict=True):
            tokens = [token]
            step = torch.cat([behind.expand(len(token), -1), token], 1).to(device)
            cache = None
            for place in range(1, length):
                out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                total = out.logits[:, -1].double().softmax(-1).cumsum(-1)
                if not torch.isfinite(total).all():
                    raise SaapError("the logits of the model are not finite: load it in float32")
                wanted = draw[:, place, None].to(device) * total[:, -1:]
                step = torch.searchsorted(total, wanted, right=True).clamp_(max=total.shape[1] - 1)
                tokens.append(step.cpu())
            written.append(torch.cat(tokens, 1))
            bar.update(len(draw))
    return torch.cat(written)
