"""Per-sample Taylor importance of coupled groups, without ever holding a gradient of the model (SAAP eq. 1–2).

For sample d with loss L_d (mean next-token cross-entropy) and weight W, s = W ⊙ ∂L_d/∂W. A backward pass that stops at
the activations gives, at every linear layer, its input x and the gradient δ of its output; ∂L_d/∂W = δᵀx is formed tile
by tile, reduced at once, and thrown away. So memory is weights + activations + one tile.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError, not_finite
from saap.models.groups import layer_parts, weight_of
from saap.models.offload import input_device, is_offloaded
from saap.progress import tqdm
from saap.scoring.backward import LOSS_SCALES, backward, watch_gradients
from saap.scoring.expert_importance import ExpertChannels
from saap.scoring.salience import TILE, channel_sums

# Tokens in one pass where no batch size is asked for. On a CPU enough for full matrix products, since what a pass keeps
# for its backward grows with them (23 kB a token and layer of a model 576 wide, 93 kB of one 4,096 wide in 16 bits).
# On a GPU launching a pass's kernels takes as long as 2,000 tokens' arithmetic, and weights that are fetched layer by
# layer are worth even more: such passes keep only the inputs of layers, and repeat each layer in the backward.
TOKENS_AT_ONCE = {"cpu": 128, "cuda": 3200, "offloaded": 8192}

HESSIANS = ("none", "fisher")
VECTOR_UNITS = ("row", "group")


def score(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    hessian: str = "none",
    vector_unit: str = "row",
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse and fine importance of every group for every calibration sample.

    Args:
        model: a causal language model of a known family, in eval mode or not (it is put there); on one device, or
            spread by accelerate over devices, CPU and disk. Weights that are not on their device are fetched layer by
            layer, and then a pass keeps only the inputs of layers, on the CPU.
        tokens: int64 (D, T), T ≥ 2.
        hessian: 'none' or 'fisher': whether the coarse score has the second-order term too.
        vector_unit: 'row': |Σ s| per row (or column) of each matrix, then summed over the group (eq. 1);
            'group': |Σ s| over the whole group at once.
        batch_size: samples in one pass (None: `samples_at_once`). Changes speed and memory, not the result.

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
    batch_size: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`score`, one batch of samples at a time: yields (vector, element), each float32 (batch, N)."""
    if hessian not in HESSIANS or vector_unit not in VECTOR_UNITS:
        raise SaapError(f"hessian must be one of {HESSIANS} and vector_unit one of {VECTOR_UNITS}")
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise SaapError(f"calibration tokens must be (samples, length ≥ 2), got {tuple(tokens.shape)}")
    model.eval()
    channels = _Channels(model)
    batch_size = batch_size or samples_at_once(model, tokens.shape[1])
    scales = LOSS_SCALES if model.dtype == torch.float16 else (1.0,)
    with tqdm(total=len(tokens), desc="score", unit="sample") as bar:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            numbers = torch.arange(start, start + len(batch))
            vector, element = _score_batch(model, batch, numbers, channels, hessian, vector_unit, scales)
            yield vector.numpy(), element.numpy()
            bar.update(len(batch))


def samples_at_once(model: nn.Module, length: int) -> int:
    """How many samples of that length `score` takes in one pass."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    where = "offloaded" if is_offloaded(model) else "cpu" if on_cpu else "cuda"
    return max(1, TOKENS_AT_ONCE[where] // length)


class _Channels:
    """The channels of all matrices of all groups one after another, and which of them make each group.

    matrices: (layer, matrix, axis, linear, its channels) in the order of `group_matrices`; groups: for groups of one
    width each, their numbers in the order of `discover` and their channels, int64 (n,) and (n, width), on `device`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = input_device(model)
        self.matrices: list[tuple[int, str, int, nn.Linear, slice]] = []
        structures: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.count = 0
        for layer, kinds in enumerate(layer_parts(model)):
            for kind, part, linear in ((kind, *member) for kind, members in kinds.items() for member in members):
                start, self.count = self.count, self.count + linear.weight.shape[part.axis]
                self.matrices.append((layer, part.matrix, part.axis, linear, slice(start, self.count)))
                structures.setdefault((layer, kind), []).append(part.by_unit(torch.arange(start, self.count)))
        self.experts = ExpertChannels(model, self.count)
        self.count = self.experts.count
        structures |= {structure: [channels] for structure, channels in self.experts.structures.items()}
        structures = dict(sorted(structures.items()))  # of a layer attention, expert, mlp
        groups: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.total = 0
        for parts in structures.values():
            channels = torch.cat(parts, 1)
            numbers = torch.arange(self.total, self.total + len(channels))
            self.total += len(channels)
            groups.setdefault(channels.shape[1], []).append((numbers, channels))
        self.groups = [[torch.cat(t).to(self.device) for t in zip(*same, strict=True)] for same in groups.values()]

    def sum(self, found: torch.Tensor) -> torch.Tensor:
        """(…, channels) → (…, groups)"""
        out = found.new_empty(*found.shape[:-1], self.total)
        for numbers, channels in self.groups:
            out[..., numbers] = found[..., channels].sum(-1)
        return out


def _score_batch(model, batch, numbers, channels, hessian, vector_unit, scales):  # type: ignore[no-untyped-def]
    """float32 (D, N), twice; numbers: those of the samples, for messages."""
    # memory for tiles and results comes before the activations: taken among them, it would fragment a CPU's memory
    work = torch.empty(TILE)
    made = torch.zeros if channels.experts.mixtures else torch.empty  # experts without tokens are never seen
    sums = made(2, len(batch), channels.count, device=channels.device)

    def see(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        _, _, axis, linear, place = channels.matrices[index]
        weight, here = weight_of(linear, delta.device), work if delta.device == work.device else None
        sums[:, :, place] = channel_sums(weight, delta, x, axis, hessian=hessian, scale=scales[0], work=here)

    with (
        watch_gradients([linear for *_, linear, _ in channels.matrices], see),
        channels.experts.watched(sums, hessian, scales[0]),
    ):
        backward(model, batch, scales[0], recompute=channels.device.type == "cuda")
    vectors = channels.sum(sums[0].abs() if vector_unit == "row" else sums[0]).abs().cpu()
    elements = channels.sum(sums[1]).cpu()
    finite = (vectors.isfinite() & elements.isfinite()).all(1)
    if not finite.all():
        if len(scales) == 1:
            raise _not_finite(model, channels, sums, numbers)
        again = ~finite
        vectors[again], elements[again] = _score_batch(
            model, batch[again], numbers[again], channels, hessian, vector_unit, scales[1:]
        )
    return vectors, elements


def _not_finite(model: nn.Module, channels: _Channels, sums: torch.Tensor, numbers: torch.Tensor) -> SaapError:
    """Names the first matrix that holds a bad weight, which spoils all scores; else the first bad score."""
    first_bad = ""
    for layer, matrix, _, linear, place in channels.matrices:
        finite = sums[:, :, place].isfinite().all(0).all(1)
        if finite.all():
            continue
        where = f"the score of layer {layer}, {matrix}, sample {numbers[int(finite.int().argmin())]}"
        if not torch.isfinite(weight_of(linear, sums.device)).all():
            return SaapError(f"{where} is not finite: neither are its weights")
        first_bad = first_bad or where
    return not_finite(first_bad or "the score of an expert", model)
