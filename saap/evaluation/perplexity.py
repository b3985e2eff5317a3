"""Perplexity by the papers' protocol (LLM-Pruner): one token stream, cut into windows, each scored on its own."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError, TooShort
from saap.evaluation.log_probs import log_probs
from saap.models.products import FastLinears
from saap.progress import tqdm
from saap.texts import calibration_bos


@dataclass(frozen=True)
class Perplexity:
    """value = exp(mean NLL); stderr by the delta method from the spread of the windows' mean NLL; n = windows.

    items: the mean NLL of each window, nats a token.
    """

    value: float
    stderr: float
    n: int
    items: list[float]


def window_bos(model: nn.Module, tokenizer: Any, wish: str = "auto") -> int | None:
    """The token for `perplexity` to put before each window, or None.

    wish: "always", "never" or "auto", that of the calibration (`calibration_bos`). Raises SaapError for "always" when
    the tokenizer has none.
    """
    token: int | None = tokenizer.bos_token_id
    if wish == "always" and token is None:
        raise SaapError("the tokenizer has no BOS token: set evaluate.bos to 'auto' or 'never'")
    if wish == "auto":
        return calibration_bos(str(model.config.model_type), tokenizer)  # type: ignore[union-attr]
    return token if wish == "always" else None


@torch.no_grad()
def perplexity(
    model: nn.Module,
    rows: list[str],
    tokenizer: Any,
    *,
    window: int,
    max_tokens: int | None = None,
    batch_tokens: int = 2048,
    bos: int | None = None,
    name: str = "perplexity",
) -> Perplexity:
    r"""Perplexity of a causal model on rows of text joined with "\n\n".

    The joined text is tokenised once and cut into non-overlapping windows of `window` tokens, the remainder dropped;
    the NLL is the mean over the window − 1 targets of each window.
    `max_tokens` keeps only the first so many tokens of the text.
    `bos` is a token to put before each window (see `window_bos`): the model sees it, and as many tokens are targets.
    None leaves the text as the tokenizer gives it, which may begin with one, as in the papers' code.
    Raises TooShort when the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(rows), return_tensors="pt", verbose=False)["input_ids"][0]
    if bos is not None and ids[:1].tolist() == [bos]:
        ids = ids[1:]
    ids = ids[:max_tokens]
    windows = ids[: len(ids) // window * window].view(-1, window)
    if len(windows) == 0:
        raise TooShort(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    device = next(model.parameters()).device
    losses = []
    step = max(1, batch_tokens // window)
    with tqdm(total=len(windows), desc=f"{name} @{window}", unit="window") as bar:
        for batch in windows.split(step):
            batch = batch.to(device)
            with FastLinears():
                whole = batch if bos is None else F.pad(batch, (1, 0), value=bos)
                states = model.base_model(whole, use_cache=False).last_hidden_state  # type: ignore[operator]
            hidden = states[:, -window:-1]
            targets = batch[:, 1:]
            found, _ = log_probs(model, hidden.flatten(0, 1), torch.arange(targets.numel()), targets.flatten())
            losses.append(-found.view(targets.shape).mean(1).double().cpu())
            bar.update(len(batch))
    loss = torch.cat(losses)
    value = math.exp(min(loss.mean().item(), 700.0))  # a broken model must not end in an overflow error
    spread = loss.std().item() / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    return Perplexity(value, value * spread, len(loss), loss.tolist())
