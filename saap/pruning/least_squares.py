"""The columns that stay take over what was removed: output matrices refitted in closed form, layer after layer.

Minimising ‖WX − W'X'‖² over the weights that stay is the optimal brain surgeon's update (Hassibi & Stork 1993) in the
form of SparseGPT (arXiv 2301.00774) and ZipLM (2302.04089), for whole columns. Ours is what is fitted to, and how the
tokens count: see `refit`.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from saap.errors import SaapError
from saap.models.families import family_of
from saap.models.groups import discover
from saap.models.offload import is_offloaded
from saap.models.products import FastLinears, product
from saap.models.stream import Pass, Stream
from saap.progress import tqdm

RIDGE = 1.0  # chosen on held-out calibration and instruction text, see docs/saap_plus.md
HELD_OUT = "held_out"
RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # that a matrix may then have
HELD_BACK = 5  # of so many sequences one, the first


@torch.no_grad()
def refit(
    small: nn.Module,
    model: nn.Module,
    keep: np.ndarray,
    tokens: torch.Tensor,
    *,
    ridge: float | str = RIDGE,
    batch_size: int = 4,
) -> nn.Module:
    """Refit every output matrix (o_proj, down_proj and their likes) of the pruned model that lost columns.

    In order of depth, with x_t the inputs the *pruned* model gives the matrix, and h_t, h'_t the residual streams
    of the dense and the pruned model behind it, each W becomes W + Δ with Δ the minimiser of

        Σ_t ‖h_t − h'_t − Δ x_t‖² / ‖h_t‖²  +  λ‖Δ‖²,      λ = ridge · mean diagonal of Σ_t x_t x_tᵀ / ‖h_t‖².

    So a matrix makes up for its own lost columns and for what the layers before it left wrong. The weights 1/‖h_t‖² are
    those of the next normalisation, which sees only directions; without them the few tokens with massive activations
    (the first of a sequence) decide nearly everything. Shapes, and so checkpoints, stay as they are; biases too.
    Experts are fitted one after another, each to what is left by those before it: the x_t of an expert are what enters
    its down_proj, times the router's weight, for the tokens it gets. An expert that gets none stays as it is.
    Where the layer multiplies what it adds to the stream (Granite), Δ x_t is multiplied so too. Where it normalises it
    (Gemma 2 and 3, GLM-4, OLMo 2 and 3), h_t and h'_t are the outputs of the matrix itself, W X before that norm.

    Args:
        small: `prune(model, keep)`, changed in place and returned.
        tokens: int64 (D, T), the calibration text.
        ridge: towards the sliced weights; ∞ leaves them. 'held_out': each matrix has that of `RIDGES` which, fitted on
            four fifths of the sequences, is best on the fifth; it is then fitted on all.
        batch_size: sequences at once. Changes speed and memory, not the result.

    Raises:
        SaapError: a ridge that is not positive, or to be chosen on a single sequence, an activation that is not
            finite, or a BLOOM with `apply_residual_connection_post_layernorm`.
    """
    if ridge == HELD_OUT and len(tokens) < 2:
        raise SaapError("a ridge is chosen on sequences held back: give at least two, or the ridge")
    if ridge != HELD_OUT and not (isinstance(ridge, float | int) and ridge > 0):
        raise SaapError(f"ridge must be positive, or 'held_out', got {ridge!r}")
    if is_offloaded(model):
        raise SaapError("the refit needs a model whose weights are all on its device")
    if getattr(model.config, "apply_residual_connection_post_layernorm", False):
        raise SaapError("no refit for a BLOOM whose residual stream is normalised: layers do not add to their input")
    family = family_of(model.config)
    lost = {(layer, kind) for layer, kind, index in discover(model).structures() if not keep[index].all()}
    dense, lean = Stream(model, tokens, batch_size), Stream(small, tokens, batch_size)
    with FastLinears():
        for layer, config in enumerate(tqdm(family.layer_configs(model), desc="refit", unit="layer")):
            wanted, found, factor = dense.through(layer), lean.through(layer), family.residual(config)
            if (layer, "attention") in lost:
                between = _between_halves(dense, lean, wanted, found, factor)
                drifts = _before_norm(wanted, found, "attention") if family.post_norm else between
                _fit(lean.matrices[layer, "attention"], [factor * own.x["attention"] for own in found], drifts, ridge)
                found = lean.through(layer)
            if {(layer, "mlp"), (layer, "expert")} & lost:
                found = _second_half(family, layer, lean, wanted, found, factor, ridge)
            dense.states = [theirs.out for theirs in wanted]
            lean.states = [own.out for own in found]
    return small


def _second_half(
    family: Any, layer: int, lean: Stream, wanted: list[Pass], found: list[Pass], factor: float, ridge: float | str
) -> list[Pass]:
    """Fit the MLP, or the experts, of the layer; returns its passes after that."""
    if layer in lean.mixtures:
        _fit_experts(family, lean.mixtures[layer], found, _behind(wanted, found), ridge)
        return lean.through(layer)
    drifts = _before_norm(wanted, found, "mlp") if family.post_norm else _behind(wanted, found)
    change = _fit(lean.matrices[layer, "mlp"], [factor * own.x["mlp"] for own in found], drifts, ridge)
    if family.post_norm:
        return lean.through(layer)
    for own in found:
        own.out += factor * F.linear(own.x["mlp"], change)
    return found


def _between_halves(
    dense: Stream, lean: Stream, wanted: list[Pass], found: list[Pass], factor: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h and h − h' of each batch between the halves of the layer: what came in, and what attention adds."""
    return [
        (
            before + factor * theirs.y["attention"],
            before - own_before + factor * (theirs.y["attention"] - own.y["attention"]),
        )
        for before, own_before, theirs, own in zip(dense.states, lean.states, wanted, found, strict=True)
    ]


def _behind(wanted: list[Pass], found: list[Pass]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h and h − h' of each batch behind the layer."""
    return [(theirs.out, theirs.out - own.out) for theirs, own in zip(wanted, found, strict=True)]


def _before_norm(wanted: list[Pass], found: list[Pass], kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """y and y − y' of the output matrices themselves, where a norm stands before the stream."""
    return [(theirs.y[kind], theirs.y[kind] - own.y[kind]) for theirs, own in zip(wanted, found, strict=True)]


def _fit(
    linear: nn.Linear,
    inputs: list[torch.Tensor],
    drifts: list[tuple[torch.Tensor, torch.Tensor]],
    ridge: float | str,
) -> torch.Tensor:
    """Add Δ to the weight, and return it. inputs: x of each batch; drifts: h and h − h' of each batch."""
    flat, first = [], 0
    for x, (stream, drift) in zip(inputs, drifts, strict=True):
        flat.append((*(t.flatten(0, -2) for t in (x, stream, drift)), _held(first, x)))
        first += len(x)
    change = _solved(linear.weight, flat, ridge)
    linear.weight += change
    return change


def _fit_experts(
    family: Any,
    experts: nn.Module,
    found: list[Pass],
    drifts: list[tuple[torch.Tensor, torch.Tensor]],
    ridge: float | str,
) -> None:
    """Add a Δ to the down_proj of each expert; drifts: h and h − h' of each batch."""
    streams, first = [], 0
    for h, drift in drifts:
        streams.append((h.flatten(0, -2), drift.flatten(0, -2).float(), _held(first, h)))
        first += len(h)
    for expert in range(experts.num_experts):  # type: ignore[arg-type]
        down, seen = family.down(experts, expert), []
        for number, own in enumerate(found):
            x, index, weights = own.routed
            token, place = torch.where(index == expert)
            inputs = weights[token, place, None] * family.activations(experts, expert, x[token])
            seen.append((number, token, inputs))
        if not sum(len(token) for _, token, _ in seen):
            continue
        batches = [(inputs, *(t[token] for t in streams[number])) for number, token, inputs in seen]
        change = _solved(down.T, batches, ridge)
        down += change.T
        for number, token, inputs in seen:
            streams[number][1][token] -= F.linear(inputs, change).float()


def _held(first: int, x: torch.Tensor) -> torch.Tensor:
    """Which tokens of a batch (b, T, …), whose first sequence has this number, are held back: bool (b·T,)."""
    return (torch.arange(first, first + len(x), device=x.device) % HELD_BACK == 0).repeat_interleave(
        x[0, ..., 0].numel()
    )


def _solved(weight: torch.Tensor, batches: list[tuple[torch.Tensor, ...]], ridge: float | str) -> torch.Tensor:
    """Δ (out, in), like weight (out, in).

    batches: x (n, in), h (n, out), h − h' (n, out), and whether a token is held back, bool (n,), of each.
    """
    rows, columns = weight.shape
    parts = [  # those to fit on, and those held back; one alone where the ridge is given
        tuple(torch.zeros(size, columns, device=weight.device) for size in (columns, rows))
        for _ in range(2 if ridge == HELD_OUT else 1)
    ]
    for x, stream, drift, held in batches:
        for number, (gram, cross) in enumerate(parts):
            own = held == bool(number) if ridge == HELD_OUT else slice(None)
            x_t, h_t, drift_t = (t[own].float() for t in (x, stream, drift))
            if len(x_t):
                weighted = x_t / h_t.square().sum(1, keepdim=True)
                gram += product(weighted.T, x_t.T)
                cross += product(drift_t.T, weighted.T)
    if not all(torch.isfinite(each).all() for part in parts for each in part):
        raise SaapError("an activation is not finite: load the model in float32")
    fitted, *held_back = [(gram.double(), cross.double()) for gram, cross in parts]
    if held_back:
        (gram, cross), changes = held_back[0], {each: _ridged(*fitted, each) for each in RIDGES}
        # Σ over the tokens held back of ‖h − h' − Δx‖² / ‖h‖², less what does not depend on Δ
        ridge = min(RIDGES, key=lambda each: (changes[each] @ gram - 2 * cross).mul_(changes[each]).sum().item())
        fitted = fitted[0] + gram, fitted[1] + cross
    return _ridged(*fitted, float(ridge)).to(weight.dtype)


def _ridged(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    penalised, mean = gram.clone(), gram.diagonal().mean()
    penalised.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(penalised)).T
