"""What criteria use beside the per-sample scores: gradients and activations, summed over the calibration text.

Activations are those of the *output matrices*, o_proj and down_proj and their likes: the matrices whose columns belong
to groups (`output_matrices`), so whose inputs are what the groups write.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError, not_finite
from saap.models.families import Part
from saap.models.groups import group_matrices
from saap.models.offload import input_device, is_offloaded
from saap.progress import tqdm
from saap.scoring.backward import see_gradients

Structure = tuple[int, str]  # (layer, kind)


@dataclass(frozen=True)
class Moments:
    """Of the inputs x of one output matrix over all T calibration tokens; each float64 (in_features,).

    mean; variance Σ(x − mean)²/(T − 1); norm √Σx².
    """

    mean: np.ndarray
    variance: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class TaylorSums:
    """LLM-Pruner's three importances of every group, each float64 (N,), in the order of `discover`.

    With W·ḡ from the mean gradient ḡ over the samples and h = mean of the squared per-sample gradients:
    vectorize Σ_rows |Σ W·ḡ|; param_first Σ |W·ḡ|; param_mix Σ |W·ḡ − ½·W²·h|.

    Under its own name each with the query heads that its KV head serves. With "_as_coded" the sums of LLM-Pruner's
    code: it folds the rows of q_proj and the columns of o_proj, R = H_q/H_kv times as many as those of k_proj, to
    (R, H_kv·d) and sums over the first axis, so KV head h gets the query heads h, h + H_kv, h + 2·H_kv, …, where those
    it serves are h·R … h·R + R − 1. Without grouped queries both are the same.
    """

    vectorize: np.ndarray
    param_first: np.ndarray
    param_mix: np.ndarray
    vectorize_as_coded: np.ndarray
    param_first_as_coded: np.ndarray
    param_mix_as_coded: np.ndarray


def output_matrices(model: nn.Module) -> Iterator[tuple[int, str, Part, nn.Linear]]:
    """(layer, kind, part, linear) of the matrices whose columns belong to groups, in the order of `discover`.

    Group u of (layer, kind) owns the columns u·part.width … (u + 1)·part.width − 1.
    """
    return (matrix for matrix in group_matrices(model) if matrix[2].axis == 1)


def input_moments(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> dict[Structure, Moments]:
    """(layer, kind) → moments of the inputs of its output matrix, in one forward pass over tokens int64 (D, T).

    Accumulated in float64 by the pairwise update of means and squared deviations, so that large means cost no digits.
    Raises SaapError when an activation is not finite.
    """
    sums: dict[Structure, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def see(structure: Structure, x: torch.Tensor) -> None:
        x = x.double()
        count, mean = len(x), x.mean(0)
        squares = (x - mean).square_().sum(0)
        if structure in sums:
            count0, mean0, squares0 = sums[structure]
            step, count = mean - mean0, count0 + count
            squares = squares0 + squares + step.square() * (count0 * len(x) / count)
            mean = mean0 + step * (len(x) / count)
        sums[structure] = count, mean, squares

    _forward(model, tokens, batch_size, see, "activations")
    found = {}
    for (layer, kind), (count, mean, squares) in sums.items():
        if not torch.isfinite(squares).all():
            raise not_finite(f"an activation in layer {layer} ({kind})", model)
        norm = (squares + count * mean.square()).sqrt()
        found[layer, kind] = Moments(*(t.cpu().numpy() for t in (mean, squares / (count - 1), norm)))
    return found


def taylor_sums(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> TaylorSums:
    """LLM-Pruner's importances over tokens int64 (D, T), from one backward pass a sample.

    Holds two float32 numbers for every weight of the layers (LLM-Pruner's own needs), and no gradient of the rest.
    Raises SaapError when a score is not finite, and for a model whose weights are partly away from its device.
    """
    if is_offloaded(model):
        raise SaapError("summed gradients (criterion llm_pruner) need a model whose weights are all on its device")
    members = list(group_matrices(model))
    first = [torch.zeros_like(linear.weight, dtype=torch.float32) for *_, linear in members]
    second = [torch.zeros_like(total) for total in first]

    def see(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        for x_d, delta_d in zip(x.float(), delta.float(), strict=True):
            gradient = delta_d.T @ x_d
            first[index].add_(gradient)
            second[index].addcmul_(gradient, gradient)

    see_gradients(model, tokens, [linear for *_, linear in members], see, batch_size=batch_size, name="gradients")
    found: dict[str, dict[Structure, torch.Tensor]] = {field.name: {} for field in fields(TaylorSums)}
    narrowest: dict[Structure, int] = {}  # rows a unit of k_proj and v_proj
    for layer, kind, part, _ in members:
        if part.axis == 0:
            narrowest[layer, kind] = min(part.width, narrowest.get((layer, kind), part.width))
    with torch.no_grad():
        for index, (layer, kind, part, linear) in enumerate(members):
            weight = linear.weight.float()
            linear_term = weight * first[index] / len(tokens)
            mixed = linear_term - 0.5 * weight.square() * second[index] / len(tokens)
            across = 1 - part.axis
            for name, rows in (
                ("vectorize", linear_term.sum(across).abs()),
                ("param_first", linear_term.abs().sum(across)),
                ("param_mix", mixed.abs().sum(across)),
            ):
                if not torch.isfinite(rows).all():
                    raise not_finite(f"the score of layer {layer}, {part.matrix}", model)
                rows = rows.double().cpu()
                units = folded = part.by_unit(rows).sum(1)
                if len(part.stretches) == 1 and not part.rest:
                    repeats = max(1, part.width // narrowest[layer, kind])  # query heads a KV head
                    folded = rows.view(repeats, -1).sum(0).view(-1, part.width // repeats).sum(1)
                for variant, sums in ((name, units), (f"{name}_as_coded", folded)):
                    found[variant][layer, kind] = found[variant].get((layer, kind), 0) + sums
    return TaylorSums(**{name: torch.cat(list(sums.values())).numpy() for name, sums in found.items()})


@torch.no_grad()
def _forward(
    model: nn.Module, tokens: torch.Tensor, batch_size: int, see: Callable[[Structure, torch.Tensor], None], name: str
) -> None:
    """Run the layers on the tokens; see gets the input of every output matrix as (tokens of the batch, in)."""
    model.eval()
    device = input_device(model)
    with ExitStack() as stack:
        for layer, kind, _, linear in output_matrices(model):
            structure = (layer, kind)
            handle = linear.register_forward_pre_hook(
                lambda _, inputs, structure=structure: see(structure, inputs[0].flatten(0, -2))
            )
            stack.callback(handle.remove)
        with tqdm(total=len(tokens), desc=name, unit="sample") as bar:
            for batch in tokens.split(batch_size):
                model.base_model(batch.to(device), use_cache=False)  # type: ignore[operator]
                bar.update(len(batch))
