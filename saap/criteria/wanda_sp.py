"""Wanda-sp: Wanda (Sun et al., arXiv 2306.11695) on structures, as FLAP (arXiv 2312.11983) compares with it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError, not_finite
from saap.models.groups import discover, refuse_experts
from saap.models.offload import is_offloaded
from saap.models.stream import Stream
from saap.progress import tqdm
from saap.pruning.plan import PROTECTED, select

BATCH = 4  # sequences at once; no part of the result


@torch.no_grad()
def wanda_sp(
    model: nn.Module,
    tokens: torch.Tensor,
    ratio: float,
    kinds: str = "pooled",
    protect: Sequence[int] = PROTECTED,
    align: int = 32,
) -> np.ndarray:
    """mean_i |W_ij| · ‖x_j‖₂ of column j of o_proj and down_proj, summed over the columns of a head.

    As in its authors' code, layers are pruned one after another. The inputs of both matrices are those behind the
    layers already pruned, with the layer itself still whole. Then its lowest heads and channels are removed and its new
    output is passed on. How many are removed is what `select(search="uniform_down")` removes at this ratio, whatever
    the scores. So that search, its default, keeps what was kept here.

    Our reading: with grouped queries a group is all columns of the query heads of a KV head; channels come in steps of
    `align` (1 in its code).

    Args:
        tokens: int64 (D, T), the calibration text.
        ratio, kinds, protect, align: as in `saap.select`.

    Raises:
        SaapError: a ratio out of reach, an activation that is not finite, or weights away from their device.
    """
    if is_offloaded(model):
        raise SaapError("wanda_sp prunes as it goes, and needs a model whose weights are all on its device")
    refuse_experts(model)
    groups = discover(model)
    limits = {"search": "uniform_down", "kinds": kinds, "protect": tuple(protect), "align": align}
    counted = select(np.zeros(len(groups)), groups, ratio, **limits)  # type: ignore[arg-type]
    left = {(layer, kind): int(counted[index].sum()) for layer, kind, index in groups.structures()}
    stream = Stream(model, tokens, BATCH)
    scores = []
    for layer in tqdm(range(len(stream.layers)), desc="wanda_sp", unit="layer"):
        squares: dict[str, torch.Tensor] = {}
        outs, masks = [], {}
        for seen in stream.through(layer):
            outs.append(seen.out)
            for kind, x in seen.x.items():
                squares[kind] = x.flatten(0, -2).double().square().sum(0).add_(squares.get(kind, 0.0))
        for kind in squares:
            linear = stream.matrices[layer, kind]
            column = linear.weight.float().abs().mean(0, dtype=torch.float64)
            score = (column * squares[kind].sqrt()).view(-1, stream.widths[layer, kind]).sum(1).cpu().numpy()
            if not np.isfinite(score).all():
                raise not_finite(f"an activation in layer {layer} ({kind})", model)
            scores.append(score)
            own = score.reshape(stretches := groups.stretches(layer, kind), -1)
            lowest = np.argsort(-own, 1, kind="stable")[:, left[layer, kind] // stretches :]
            if lowest.size:
                masks[kind] = torch.from_numpy((lowest + np.arange(0, score.size, own.shape[1])[:, None]).ravel())
        stream.states = [seen.out for seen in stream.through(layer, without=masks)] if masks else outs
    return np.concatenate(scores)
