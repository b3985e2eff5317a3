"""Per-sample Taylor importance of coupled groups, without ever holding a gradient of the model (SAAP eq. 1–2).

For sample d with loss L_d (mean next-token cross-entropy) and weight W, s = W ⊙ ∂L_d/∂W. A backward pass that stops at
the activations gives, at every linear layer, its input x and the gradient δ of its output; ∂L_d/∂W = δᵀx is formed tile
by tile, reduced at once, and thrown away. So memory is weights + activations + one tile.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from saap.errors import SaapError
from saap.groups import KINDS, block_parts

TILE = 1 << 17  # elements of ∂L/∂W at a time: half a megabyte of float32 stays in a core's own cache

HESSIANS = ("none", "fisher")
VECTOR_UNITS = ("row", "group")


def score(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    hessian: str = "none",
    vector_unit: str = "row",
    batch_size: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse and fine importance of every group for every calibration sample.

    Args:
        model: a causal language model of a known family, on one device, in eval mode or not (it is put there).
        tokens: int64 (D, T), T ≥ 2.
        hessian: 'none' or 'fisher': whether the coarse score has the second-order term too.
        vector_unit: 'row': |Σ s| per row (or column) of each matrix, then summed over the group (eq. 1);
            'group': |Σ s| over the whole group at once.
        batch_size: samples in one forward pass. Changes speed and memory, not the result.

    Returns:
        vector, element: float32 (D, N), columns in the order of `saap.discover(model)`:
        vector  I^V = Σ_rows |Σ_weights s|            (eq. 1)
        element I^E = Σ_weights |s − ½·s²|            (eq. 2, diagonal Fisher for the Hessian)

    Raises:
        SaapError: unknown family or switch; a score that is not finite (names layer, matrix and sample).
    """
    rows = list(score_batches(model, tokens, hessian, vector_unit, batch_size))
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


def score_batches(
    model: nn.Module,
    tokens: torch.Tensor,
    hessian: str = "none",
    vector_unit: str = "row",
    batch_size: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`score`, one batch of samples at a time: yields (vector, element), each float32 (batch, N)."""
    if hessian not in HESSIANS or vector_unit not in VECTOR_UNITS:
        raise SaapError(f"hessian must be one of {HESSIANS} and vector_unit one of {VECTOR_UNITS}")
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise SaapError(f"calibration tokens must be (samples, length ≥ 2), got {tuple(tokens.shape)}")
    model.eval()
    parts = block_parts(model)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with tqdm(total=len(tokens), desc="score", unit="sample") as bar:
            for start in range(0, len(tokens), batch_size):
                batch = tokens[start : start + batch_size]
                yield _score_batch(model, batch, parts, hessian, vector_unit, first_sample=start)
                bar.update(len(batch))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _score_batch(model, batch, parts, hessian, vector_unit, first_sample):  # type: ignore[no-untyped-def]
    samples = len(batch)
    sums: dict[tuple[int, str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []

    def watch(layer: int, kind: str, part, linear: nn.Linear) -> None:  # type: ignore[no-untyped-def]
        def forward_hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0].detach()

            def backward_hook(delta: torch.Tensor) -> None:
                pairs = [channel_sums(linear.weight, delta[b], x[b], part.axis, hessian) for b in range(samples)]
                signed, element = (torch.stack(t).view(samples, -1, part.width) for t in zip(*pairs, strict=True))
                coarse = signed.abs() if vector_unit == "row" else signed
                sums[layer, kind, part.matrix] = coarse.sum(-1), element.sum(-1)

            output.register_hook(backward_hook)

        handles.append(linear.register_forward_hook(forward_hook))

    for layer, kinds in enumerate(parts):
        for kind, members in kinds.items():
            for part, linear in members:
                watch(layer, kind, part, linear)
    try:
        embedding = model.get_input_embeddings()
        ids = batch.to(embedding.weight.device)
        with torch.enable_grad():
            states = embedding(ids).detach().requires_grad_()
            logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum")
            torch.autograd.backward(loss / (ids.shape[1] - 1), inputs=[states])
    finally:
        for handle in handles:
            handle.remove()

    vector, element = [], []
    for layer, kinds in enumerate(parts):
        for kind in KINDS:
            pairs = []
            for part, _ in kinds[kind]:
                pair = sums[layer, kind, part.matrix]
                finite = torch.isfinite(pair[1]).all(1) & torch.isfinite(pair[0]).all(1)
                if not finite.all():
                    sample = first_sample + int((~finite).nonzero()[0])
                    raise SaapError(_not_finite(parts, layer, part.matrix, sample))
                pairs.append(pair)
            coarse = torch.stack([p[0] for p in pairs]).sum(0)
            vector.append(coarse.abs().cpu())
            element.append(torch.stack([p[1] for p in pairs]).sum(0).cpu())
    return torch.cat(vector, 1).numpy(), torch.cat(element, 1).numpy()


def channel_sums(
    weight: torch.Tensor, delta: torch.Tensor, x: torch.Tensor, axis: int, hessian: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ s (or Σ s − ½s² with hessian='fisher') and Σ |s − ½s²| of each row (axis 0) or column (axis 1), s = W ⊙ δᵀx.

    weight (out, in), delta (T, out), x (T, in), any float dtype; returns float32 (out,) or (in,), twice.
    """
    delta, x = delta.float(), x.float()
    channels = weight.shape[axis]
    step = max(1, TILE // weight.shape[1 - axis])
    signed = torch.empty(channels, device=weight.device)
    element = torch.empty(channels, device=weight.device)
    for start in range(0, channels, step):
        tile = slice(start, start + step)
        rows, columns = (tile, slice(None)) if axis == 0 else (slice(None), tile)
        s = (delta[:, rows].T @ x[:, columns]).mul_(weight[rows, columns])
        second = torch.addcmul(s, s, s, value=-0.5)
        torch.sum(s if hessian == "none" else second, 1 - axis, out=signed[tile])
        torch.linalg.vector_norm(second, 1, 1 - axis, out=element[tile])
    return signed, element


def _not_finite(parts: list[dict], layer: int, matrix: str, sample: int) -> str:
    """One bad weight spoils the scores of every matrix: name the first that holds one, else the first bad score."""
    for index, kinds in enumerate(parts):
        for part, linear in (member for members in kinds.values() for member in members):
            if not torch.isfinite(linear.weight).all():
                return (
                    f"the score of layer {index}, {part.matrix}, sample {sample} is not finite: neither are its weights"
                )
    return f"the score of layer {layer}, {matrix}, sample {sample} is not finite: load the model in float32"
