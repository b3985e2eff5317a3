"""Per-sample Taylor importance of coupled groups, without ever holding a gradient of the model (SAAP eq. 1–2).

For sample d with loss L_d (mean next-token cross-entropy) and weight W, s = W ⊙ ∂L_d/∂W. A backward pass that stops at
the activations gives, at every linear layer, its input x and the gradient δ of its output; ∂L_d/∂W = δᵀx is formed tile
by tile, reduced at once, and thrown away. So memory is weights + activations + one tile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from saap.errors import SaapError
from saap.families import family_of
from saap.groups import KINDS, block_parts, weight_of
from saap.salience import TILE, channel_sums

# Tokens in one pass where no batch size is asked for: enough for full matrix products, since what a pass keeps for its
# backward grows with them (40 kB a token and block of a model 576 wide, 130 kB of one 4,096 wide in 16 bits). Weights
# that are fetched block by block are worth more tokens, of which only the inputs of blocks are kept.
TOKENS_AT_ONCE = {"cpu": 128, "cuda": 512, "offloaded": 8192}
LOGITS = 1 << 22  # at a time: 16 MB of float32

# The loss of a float16 model is scaled, by powers of two so that undoing it is exact: its gradients of 1e-8 would be
# zero in float16. Where the scaled ones overflow the sample is done again with the next scale.
LOSS_SCALES = (2.0**16, 2.0**8, 1.0)

HESSIANS = ("none", "fisher")
VECTOR_UNITS = ("row", "group")

Place = tuple[int, str, str]  # layer, kind, matrix
Sums = dict[Place, tuple[torch.Tensor, torch.Tensor]]


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
            spread by accelerate over devices, CPU and disk. Weights that are not on their device are fetched block by
            block, and then a pass keeps only the inputs of blocks, on the CPU.
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
    parts = block_parts(model)
    batch_size = batch_size or samples_at_once(model, tokens.shape[1])
    scales = LOSS_SCALES if model.dtype == torch.float16 else (1.0,)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with tqdm(total=len(tokens), desc="score", unit="sample") as bar:
            for start in range(0, len(tokens), batch_size):
                batch = tokens[start : start + batch_size]
                numbers = torch.arange(start, start + len(batch))
                vector, element = _score_batch(model, batch, numbers, parts, hessian, vector_unit, scales)
                yield vector.numpy(), element.numpy()
                bar.update(len(batch))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def samples_at_once(model: nn.Module, length: int) -> int:
    """How many samples of that length `score` takes in one pass."""
    devices = {p.device.type for p in model.parameters()}
    where = "offloaded" if "meta" in devices else "cpu" if devices == {"cpu"} else "cuda"
    return max(1, TOKENS_AT_ONCE[where] // length)


def _score_batch(model, batch, numbers, parts, hessian, vector_unit, scales):  # type: ignore[no-untyped-def]
    """float32 (D, N), twice; numbers: those of the samples, for messages."""
    sums: Sums = {}
    with _watched(parts, sums, hessian, scales[0]):
        _backward(model, batch, scales[0])
    vector, element = [], []
    for layer, kinds in enumerate(parts):
        for kind in KINDS:
            coarse, fine = [], []
            for part, _ in kinds[kind]:
                signed, absolute = (t.unflatten(1, (-1, part.width)) for t in sums[layer, kind, part.matrix])
                coarse.append((signed.abs() if vector_unit == "row" else signed).sum(-1))
                fine.append(absolute.sum(-1))
            vector.append(torch.stack(coarse).sum(0).abs().cpu())
            element.append(torch.stack(fine).sum(0).cpu())
    vectors, elements = torch.cat(vector, 1), torch.cat(element, 1)
    finite = (vectors.isfinite() & elements.isfinite()).all(1)
    if not finite.all():
        if len(scales) == 1:
            raise SaapError(_not_finite(parts, sums, numbers))
        again = ~finite
        vectors[again], elements[again] = _score_batch(
            model, batch[again], numbers[again], parts, hessian, vector_unit, scales[1:]
        )
    return vectors, elements


@contextmanager
def _watched(parts: list[dict], sums: Sums, hessian: str, scale: float) -> Iterator[None]:
    """While it holds, the backward pass of a model leaves the `channel_sums` of its linear layers in `sums`."""
    # one place for all tiles, taken before the activations, which would leave the allocator with holes
    tiles = torch.empty(2, TILE)

    def hook(place: Place, axis: int) -> Callable:
        def forward_hook(linear: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
            if not output.requires_grad:
                return  # a forward pass that will be repeated
            x = inputs[0].detach()

            def backward_hook(delta: torch.Tensor) -> None:
                weight = weight_of(linear, delta.device)
                work = tiles if delta.device == tiles.device else None
                sums[place] = channel_sums(weight, delta, x, axis, hessian=hessian, scale=scale, tiles=work)

            output.register_hook(backward_hook)

        return forward_hook

    handles = [
        linear.register_forward_hook(hook((layer, kind, part.matrix), part.axis))
        for layer, kinds in enumerate(parts)
        for kind, members in kinds.items()
        for part, linear in members
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(model: nn.Module, batch: torch.Tensor, scale: float) -> None:
    """Forward, and back to the embeddings, of scale·Σ_d L_d for tokens (D, T), a piece of the logits at a time."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    ids = batch.to(embedding.weight.device if not embedding.weight.is_meta else "cpu")
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    with torch.enable_grad(), _recomputed(model) if offloaded else nullcontext():
        states = embedding(ids).detach().requires_grad_()
        last = model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state  # type: ignore[operator]
    predicting, targets = last.detach()[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(last.device)
    chunks = -(-targets.numel() * head.out_features // LOGITS)
    pieces = [
        _logits_gradient(head, h, t, scale / (ids.shape[1] - 1))
        for h, t in zip(predicting.chunk(chunks), targets.chunk(chunks), strict=True)
    ]
    gradient = torch.zeros_like(last)
    gradient[:, :-1] = torch.cat(pieces).view_as(gradient[:, :-1])
    last.backward(gradient)


def _logits_gradient(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
    """factor·∂/∂hidden of the summed cross-entropy of head(hidden), (tokens, H): factor·(softmax − one-hot)·W."""
    surplus = torch.softmax(head(hidden).float(), -1)
    surplus[torch.arange(len(targets), device=targets.device), targets] -= 1
    weight = weight_of(head, hidden.device)
    return surplus.mul_(factor).to(weight.dtype) @ weight


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """While it holds, a forward pass keeps only the inputs of blocks, on the CPU; the backward repeats each block."""
    blocks = family_of(model.config).blocks(model)
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate replaces it
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)
    try:
        with torch.autograd.graph.save_on_cpu():
            yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _checkpointed(forward: Callable, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
    # reentrant: the first pass builds no graph, which would hold on to the weights it used
    return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)


def _not_finite(parts: list[dict], sums: Sums, numbers: torch.Tensor) -> str:
    """One bad weight spoils the scores of every matrix: name the first that holds one, else the first bad score."""
    first_bad = ""
    for layer, kinds in enumerate(parts):
        for kind, members in kinds.items():
            for part, linear in members:
                signed, element = sums[layer, kind, part.matrix]
                finite = (signed.isfinite() & element.isfinite()).all(1)
                if finite.all():
                    continue
                place = f"the score of layer {layer}, {part.matrix}, sample {numbers[int(finite.int().argmin())]}"
                if not torch.isfinite(weight_of(linear, signed.device)).all():
                    return f"{place} is not finite: neither are its weights"
                first_bad = first_bad or f"{place} is not finite: load the model in float32"
    return first_bad
