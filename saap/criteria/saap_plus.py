"""saap_plus: groups ranked by the rise of the loss per parameter, the lowest removed first. Our own criterion."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.groups import discover
from saap.pruning.least_squares import HELD_BACK, RIDGE, refit, refit_together
from saap.pruning.plan import PROTECTED, select
from saap.pruning.surgery import prune
from saap.scoring.divergence import divergence
from saap.scoring.fisher import mask_fisher

TAKE_HEADS = ("pooled", "measured")
SURE = 2.0  # standard errors by which a plan that takes heads must be nearer to the dense model


def saap_plus(
    model: nn.Module,
    fisher: np.ndarray,
    tokens: torch.Tensor,
    cuts: Sequence[float] = (),
    take_heads: str = "pooled",
    ridge: float | str = RIDGE,
    protect: Sequence[int] = PROTECTED,
    align: int = 32,
    kinds: str = "pooled",
) -> np.ndarray:
    """F_g / parameters_g, with F_g = mean_d z_gd² the Fisher information of the group's mask (`saap.mask_fisher`).

    In SAAP's terms (arXiv 2412.15127), the coarse importance and its fluctuation become one second moment over the
    samples, which is an estimate of the loss (Kwon et al., arXiv 2204.09656). It is divided by the parameters of the
    group. So one order over all layers, heads and channels spends the budget where it hurts least. Nothing is
    standardised. It goes with `search = "global"` and `compensation = "least_squares"` (`saap.refit`).

    The worth of a group changes once others are gone. So at each of `cuts`, shares of the prunable parameters, the
    model is cut (`protect`, `align` and `kinds` as in `saap.select`) and refitted (with `ridge`), and what is left is
    ranked again. Groups that an earlier cut removed stay first in the order. With cuts the score is the place in the
    order: whole numbers from 0.

    take_heads = "measured": the estimate takes no notice of the refit, which makes up for channels better than for
    heads. So at each cut there are two plans, one as the order has it, one that takes no further head. Both are made
    and refitted without a fifth of the sequences. Heads go if that leaves the model nearer to the dense one on that
    fifth (`divergence`), by more than two standard errors of the difference; otherwise the other plan is cut. The last
    of the cuts is then the ratio that the plan is for: what goes there is first in the order.

    Raises:
        SaapError: a cut out of reach, a value that is not finite, or heads measured on fewer than six sequences.
    """
    if take_heads not in TAKE_HEADS:
        raise SaapError(f"take_heads must be one of {TAKE_HEADS}, got {take_heads!r}")
    if take_heads == "measured" and (not cuts or len(tokens) <= HELD_BACK):
        raise SaapError(
            "take_heads = 'measured' needs the ratio of the plan among the cuts, and at least six sequences"
        )
    groups = discover(model)
    score, keep = fisher / groups.costs, np.ones(len(groups), bool)
    planned = partial(select, groups=groups, protect=tuple(protect), align=align, kinds=kinds)
    for cut in sorted(cuts):
        plans = [planned(score, ratio=cut)]
        if take_heads == "measured":
            spared = np.where(keep & (groups.kind == "attention"), score.max() + 1, score)
            plans.append(planned(spared, ratio=cut))
        again = np.full(len(groups), -1.0)  # below all that stays
        if take_heads == "measured" and cut == max(cuts):  # nothing is ranked behind it
            agree = np.array_equal(plans[0], plans[1])
            again[plans[0] if agree else _nearest(model, plans, tokens, ridge)[0]] = 0
        else:
            keep, small = _nearest(model, plans, tokens, ridge)
            again[keep] = mask_fisher(small, tokens) / discover(small).costs
        score[np.lexsort((score, again))] = np.arange(len(groups))
    return score


def _nearest(
    model: nn.Module, plans: list[np.ndarray], tokens: torch.Tensor, ridge: float | str
) -> tuple[np.ndarray, nn.Module]:
    """The plan that is cut, the last unless the first is clearly nearer to the dense model, and the refitted model."""
    if np.array_equal(plans[0], plans[-1]):
        return plans[0], refit(prune(model, plans[0]), model, plans[0], tokens, ridge=ridge)
    held = torch.arange(len(tokens)) % HELD_BACK == 0
    made = refit_together([prune(model, keep) for keep in plans], model, plans, tokens[~held], ridge=ridge)
    far, other = (divergence(model, small, tokens[held]) for small in made)
    best = 0 if clearly_nearer(far, other) else 1
    return plans[best], made[best]


def clearly_nearer(own: np.ndarray, other: np.ndarray) -> bool:
    """Whether own divergences, one a sequence, are lower by more than `SURE` standard errors of the paired mean."""
    gain = other - own
    return bool(gain.mean() > SURE * gain.std(ddof=1) / len(gain) ** 0.5)
