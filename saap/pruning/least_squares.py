"""The columns that stay take over what was removed: output matrices refitted in closed form, layer after layer.

Minimising ‖WX − W'X'‖² over the weights that stay is the optimal brain surgeon's update (Hassibi & Stork 1993) in the
form of SparseGPT (arXiv 2301.00774) and ZipLM (2302.04089), for whole columns. Ours is what is fitted to, and how the
tokens count: see `refit`.
"""

from collections.abc import Sequence
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
from saap.models.stream import Stream
from saap.progress import tqdm

RIDGE = 1.0  # chosen on held-out calibration and instruction text, see docs/saap_plus.md
HELD_OUT = "held_out"
RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # that a matrix may then have
HELD_BACK = 5  # of so many sequences one, the first


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
    return refit_together([small], model, [keep], tokens, ridge=ridge, batch_size=batch_size)[0]


@torch.no_grad()
def refit_together(
    smalls: Sequence[nn.Module],
    model: nn.Module,
    keeps: Sequence[np.ndarray],
    tokens: torch.Tensor,
    *,
    ridge: float | str = RIDGE,
    batch_size: int = 4,
) -> Sequence[nn.Module]:
    """`refit` of several prunings of one model, which then runs once for all of them. The results are the same."""
    if ridge == HELD_OUT and len(tokens) < 2:
        raise SaapError("a ridge is chosen on sequences held back: give at least two, or the ridge")
    if ridge != HELD_OUT and not (isinstance(ridge, float | int) and ridge > 0):
        raise SaapError(f"ridge must be positive, or 'held_out', got {ridge!r}")
    if is_offloaded(model):
        raise SaapError("the refit needs a model whose weights are all on its device")
    if getattr(model.config, "apply_residual_connection_post_layernorm", False):
        raise SaapError("no refit for a BLOOM whose residual stream is normalised: layers do not add to their input")
    family = family_of(model.config)
    structures = list(discover(model).structures())
    losts = [{(layer, kind) for layer, kind, index in structures if not keep[index].all()} for keep in keeps]
    dense, leans = Stream(model, tokens, batch_size), [Stream(small, tokens, batch_size) for small in smalls]
    with FastLinears():
        for layer, config in enumerate(tqdm(family.layer_configs(model), desc="refit", unit="layer")):
            factor = family.residual(config)
            headless = [lean for lean, lost in zip(leans, losts, strict=True) if (layer, "attention") in lost]
            outs, targets = _first_half(family, layer, factor, dense, headless, ridge)
            for lean, lost in zip(leans, losts, strict=True):
                if layer in lean.mixtures and {(layer, "mlp"), (layer, "expert")} & lost:
                    lean.states = _fit_experts(family, layer, lean, outs, ridge)
                elif (layer, "mlp") in lost:
                    lean.states = _fit_mlp(family, layer, factor, lean, targets, ridge)
                else:
                    lean.states = [own.out for own in lean.through(layer)]
            dense.states = outs
    return smalls


def _first_half(
    family: Any, layer: int, factor: float, dense: Stream, leans: list[Stream], ridge: float | str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what the dense layer gives, what its last matrix is to be fitted to) of each batch.

    The attention of `leans` is fitted: to the stream between the halves of the layer, which is what came in and what
    attention adds, or, where a norm stands before the stream, to y of its output matrix.
    """
    fits = [
        (lean.states, lean.through(layer, until="attention"), _Sums(lean.matrices[layer, "attention"].weight, ridge))
        for lean in leans
    ]
    outs, targets = [], []
    for number, (before, theirs) in enumerate(zip(dense.states, dense.through(layer), strict=True)):
        outs.append(theirs.out)
        targets.append(theirs.y["mlp"] if family.post_norm and "mlp" in theirs.y else theirs.out)
        for own_before, passes, sums in fits:
            own, y = next(passes), theirs.y["attention"]
            drift = y - own.y["attention"]
            if family.post_norm:
                sums.add(factor * own.x["attention"], y, drift)
            else:
                drift = before - own_before[number] + factor * drift
                sums.add(factor * own.x["attention"], before + factor * y, drift)
    for *_, sums in fits:
        sums.weight += sums.change()
    return outs, targets


def _fit_mlp(
    family: Any, layer: int, factor: float, lean: Stream, targets: list[torch.Tensor], ridge: float | str
) -> list[torch.Tensor]:
    """Fit the layer's MLP; returns what the layer then gives for each batch."""
    sums, outs, inputs = _Sums(lean.matrices[layer, "mlp"].weight, ridge), [], []
    for target, own in zip(targets, lean.through(layer), strict=True):
        sums.add(factor * own.x["mlp"], target, target - (own.y["mlp"] if family.post_norm else own.out))
        if not family.post_norm:
            outs.append(own.out)
            inputs.append(own.x["mlp"])
    change = sums.change()
    sums.weight += change
    if family.post_norm:
        return [own.out for own in lean.through(layer)]
    for out, x in zip(outs, inputs, strict=True):
        out += factor * F.linear(x, change)
    return outs


def _fit_experts(
    family: Any, layer: int, lean: Stream, wanted: list[torch.Tensor], ridge: float | str
) -> list[torch.Tensor]:
    """Fit the down_proj of each expert, to what is left by those before it; returns what the layer then gives."""
    experts, first, streams, routed = lean.mixtures[layer], 0, [], []
    for h, own in zip(wanted, lean.through(layer), strict=True):
        drift = (h - own.out).flatten(0, -2).float()
        streams.append((h.flatten(0, -2), drift, _held(first, h)))
        routed.append(own.routed)
        first += len(h)
    for expert in range(experts.num_experts):
        down, seen = family.down(experts, expert), []
        for number, (x, index, weights) in enumerate(routed):
            token, place = torch.where(index == expert)
            inputs = weights[token, place, None] * family.activations(experts, expert, x[token])
            seen.append((number, token, inputs))
        if not sum(len(token) for _, token, _ in seen):
            continue
        sums = _Sums(down.T, ridge)
        for number, token, inputs in seen:
            sums.add_tokens(inputs, *(t[token] for t in streams[number]))
        change = sums.change()
        down += change.T
        for number, token, inputs in seen:
            streams[number][1][token] -= F.linear(inputs, change).float()
    return [own.out for own in lean.through(layer)]


def _held(first: int, x: torch.Tensor) -> torch.Tensor:
    """Which tokens of a batch (b, T, …), whose first sequence has this number, are held back: bool (b·T,)."""
    return (torch.arange(first, first + len(x), device=x.device) % HELD_BACK == 0).repeat_interleave(
        x[0, ..., 0].numel()
    )


class _Sums:
    """What Δ of a matrix follows from, summed over batches: of the tokens to fit on, and of those held back.

    weight: (out, in). Where the ridge is given, none are held back.
    """

    def __init__(self, weight: torch.Tensor, ridge: float | str) -> None:
        self.weight, self.ridge, self.sequences = weight, ridge, 0
        rows, columns = weight.shape
        self.parts = [
            tuple(torch.zeros(size, columns, device=weight.device) for size in (columns, rows))
            for _ in range(2 if ridge == HELD_OUT else 1)
        ]

    def add(self, x: torch.Tensor, stream: torch.Tensor, drift: torch.Tensor) -> None:
        """The next batch: x (b, …, in), h and h − h' (b, …, out)."""
        held = _held(self.sequences, x)
        self.sequences += len(x)
        self.add_tokens(x.flatten(0, -2), stream.flatten(0, -2), drift.flatten(0, -2), held)

    def add_tokens(self, x: torch.Tensor, stream: torch.Tensor, drift: torch.Tensor, held: torch.Tensor) -> None:
        """x (n, in), h and h − h' (n, out), and whether a token is held back, bool (n,)."""
        for number, (gram, cross) in enumerate(self.parts):
            own = held == bool(number) if self.ridge == HELD_OUT else slice(None)
            x_t, h_t, drift_t = (t[own].float() for t in (x, stream, drift))
            if len(x_t):
                weighted = x_t / h_t.square().sum(1, keepdim=True)
                gram += product(weighted.T, x_t.T)
                cross += product(drift_t.T, weighted.T)

    def change(self) -> torch.Tensor:
        """Δ (out, in)."""
        if not all(torch.isfinite(each).all() for part in self.parts for each in part):
            raise SaapError("an activation is not finite: load the model in float32, if its weights are finite")
        ridge = self.ridge
        fitted, *held_back = [(gram.double(), cross.double()) for gram, cross in self.parts]
        if held_back:
            (gram, cross), changes = held_back[0], {each: _ridged(*fitted, each) for each in RIDGES}
            # Σ over the tokens held back of ‖h − h' − Δx‖² / ‖h‖², less what does not depend on Δ
            ridge = min(RIDGES, key=lambda each: (changes[each] @ gram - 2 * cross).mul_(changes[each]).sum().item())
            fitted = fitted[0] + gram, fitted[1] + cross
        return _ridged(*fitted, float(ridge)).to(self.weight.dtype)


def _ridged(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    penalised, mean = gram.clone(), gram.diagonal().mean()
    penalised.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(penalised)).T
