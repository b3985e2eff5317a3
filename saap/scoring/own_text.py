"""Calibration text that the dense model writes itself: no data is needed, and it is of every kind the model knows."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError, not_finite
from saap.models.logits import rows_for_the_head
from saap.models.offload import input_device, is_offloaded
from saap.models.products import FastLinears
from saap.progress import tqdm
from saap.texts import leading_bos

AT_ONCE = 64  # sequences
RUN = 256  # tokens of the vocabulary whose probabilities are first summed


@torch.no_grad()
def own_text(
    model: nn.Module, tokenizer: Any, *, count: int, length: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """`count` sequences that begin with any token and go on as the model's distribution has it, nothing cut off.

    Sequence i depends on the model, `seed` and i; rounding may turn a draw that falls between two tokens. A token drawn
    evenly from the vocabulary begins it (LLM-QAT, arXiv 2305.17888), without special tokens, and behind BOS where the
    tokenizer puts one; it is returned where `bos` names it (`calibration_bos`), as the first token of each sequence.

    Returns:
        int64 (count, length).

    Raises:
        SaapError: weights away from their device, or logits that are not finite.
    """
    if is_offloaded(model):
        raise SaapError("own text needs a model whose weights are all on its device")
    model.eval()
    begin = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    length -= len(begin)
    device = input_device(model)
    behind = torch.tensor(leading_bos(tokenizer), dtype=torch.int64)
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    # torch's generator would take 32 bits of a seed only
    draws = torch.from_numpy(np.stack([np.random.default_rng([seed, i]).random(length) for i in range(count)]))
    first = plain[(draws[:, :1] * len(plain)).long()]
    written = []
    with tqdm(total=count, desc="own text", unit="sequence") as bar, FastLinears(), rows_for_the_head(model):
        for draw, token in zip(draws.split(AT_ONCE), first.split(AT_ONCE), strict=True):
            tokens = [token]
            step = torch.cat([behind.expand(len(token), -1), token], 1).to(device)
            cache = None
            for place in range(1, length):
                out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                step = _drawn(out.logits[:, -1], draw[:, place, None].to(device), model)
                tokens.append(step.cpu())
            written.append(torch.cat([begin.expand(len(token), -1), *tokens], 1))
            bar.update(len(draw))
    return torch.cat(written)


def _drawn(logits: torch.Tensor, draw: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """The token that a number in [0, 1), float64 (b, 1), falls on in the distribution of logits (b, V): int64 (b, 1).

    First the run of `RUN` tokens that it falls in, then the token in it, so that few sums are made in float64.
    """
    share = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    runs = F.pad(share, (0, -share.shape[1] % RUN)).unflatten(1, (-1, RUN))
    behind = runs.sum(-1, dtype=torch.float64).cumsum(-1)
    if not torch.isfinite(behind[:, -1]).all():
        raise not_finite("a logit", model)
    wanted = draw * behind[:, -1:]
    run = torch.searchsorted(behind, wanted, right=True).clamp_(max=behind.shape[1] - 1)
    before = F.pad(behind, (1, 0)).gather(1, run)
    inside = runs.take_along_dim(run[..., None], 1)[:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, wanted - before, right=True).clamp_(max=RUN - 1)
    return (run * RUN + place).clamp_(max=share.shape[1] - 1)
