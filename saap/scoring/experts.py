"""What experts and their channels give: the Fisher information of their masks, and REAP's router-weighted norm."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError, not_finite
from saap.models.families import Experts, family_of
from saap.models.groups import discover, layer_parts
from saap.models.offload import input_device, is_offloaded
from saap.progress import tqdm
from saap.scoring.backward import backward, loss_scale, unscaled, watch_gradients

See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def reap(
    model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Of each layer with experts, float64 (E,): the mean over an expert's tokens of router weight · ‖its output‖₂; and
    the same for what each of its channels adds to that output, (E, I).

    The router-weighted expert activation norm of Lasby et al. (REAP, arXiv 2510.13999, eq. 9): what a token loses, to
    first order, when the expert is gone. 0 for an expert that gets no token of the calibration text.
    """
    model.eval()
    family, mixtures = mixtures_of(model)
    sums = {layer: np.zeros(module.num_experts) for layer, module in mixtures.items()}
    inside = {layer: np.zeros((len(total), family.width(mixtures[layer]))) for layer, total in sums.items()}
    counts = {layer: np.zeros_like(total) for layer, total in sums.items()}

    def see(layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, _: torch.Tensor) -> None:
        module = mixtures[layer]
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            weight = weights[token, place].double()
            entering, down = family.activations(module, expert, x[token]), family.down(module, expert)
            out = entering @ down
            if not family.layout.stacked:
                out = out + module.down_proj_bias[expert]
            sums[layer][expert] += (weight * out.double().norm(dim=1)).sum().item()
            each = weight @ entering.abs().double() * down.double().norm(dim=1)
            inside[layer][expert] += each.cpu().numpy()
            counts[layer][expert] += len(token)

    with watch_experts(mixtures, see, gradients=False), tqdm(total=len(tokens), desc="reap", unit="sample") as bar:
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)  # type: ignore[operator]
            bar.update(len(batch))
    number = {layer: np.maximum(count, 1) for layer, count in counts.items()}
    return (
        {layer: total / number[layer] for layer, total in sums.items()},
        {layer: total / number[layer][:, None] for layer, total in inside.items()},
    )


def expert_masks(
    model: nn.Module, tokens: torch.Tensor, batch_size: int, of: Callable[[torch.Tensor], torch.Tensor], name: str
) -> np.ndarray:
    """`mask_fisher` and `mask_gradient` of a mixture of experts: float64 (N,), the mean of `of(z)` over the samples.

    The mask of an expert is on its output times the router's weight, that of a channel on what it gives to that. The
    router stays as it is: that its tokens go to other experts when one is gone is not counted.
    """
    model.eval()
    family, mixtures = mixtures_of(model)
    members = [
        (layer, kind, part, linear)
        for layer, kinds in enumerate(layer_parts(model))
        for kind, own in kinds.items()
        for part, linear in own
        if part.axis == 1
    ]
    groups, length = discover(model), tokens.shape[1]
    sums = {(layer, kind): torch.zeros(len(index), dtype=torch.float64) for layer, kind, index in groups.structures()}

    def see_linear(number: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        layer, kind, part, linear = members[number]
        z = (x.float() * (delta @ linear.weight.to(delta.dtype)).float()).unflatten(-1, (-1, part.width)).sum((1, -1))
        sums[layer, kind] += of(z).sum(0).double().cpu()

    def see(layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, delta: torch.Tensor) -> None:
        module = mixtures[layer]
        inside = sums[layer, "mlp"].view(module.num_experts, -1)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            weighted = delta[token] * weights[token, place, None]
            entering = family.activations(module, expert, x[token]).float()
            z = entering * (weighted @ family.down(module, expert).T.to(weighted.dtype)).float()
            samples = torch.zeros(len(x) // length, z.shape[1], device=z.device).index_add_(0, token // length, z)
            each = samples.sum(1)
            if not family.layout.stacked:
                bias = (weighted @ module.down_proj_bias[expert].to(weighted.dtype)).float()
                each = each.index_add(0, token // length, bias)
            inside[expert] += of(samples).sum(0).double().cpu()
            sums[layer, "expert"][expert] += of(each).sum().double().cpu()

    linears = [linear for *_, linear in members]
    with tqdm(total=len(tokens), desc=name, unit="sample") as bar:
        for batch in tokens.split(batch_size):
            scale = loss_scale(model, batch, linears)
            with (
                watch_experts(mixtures, unscaled(see, scale), gradients=True),
                watch_gradients(linears, unscaled(see_linear, scale)),
            ):
                backward(model, batch, scale)
            bar.update(len(batch))
    found = torch.cat(list(sums.values())) / len(tokens)
    if not found.isfinite().all():
        raise not_finite(f"the {name} of an expert", model)
    return found.numpy()


def mixtures_of(model: nn.Module) -> tuple[Experts, dict[int, Any]]:
    """The family, and layer → experts. Raises SaapError for a model without them, and for weights that are away."""
    family = family_of(model.config)
    if not isinstance(family, Experts):
        raise SaapError(f"a {model.config.model_type} has no experts")  # type: ignore[union-attr]
    if is_offloaded(model):
        raise SaapError("experts are ranked by a model whose weights are all on its device, without offload")
    return family, family.mixtures(model)


@contextmanager
def watch_experts(mixtures: dict[int, Any], see: See, gradients: bool) -> Iterator[None]:
    """While open, see(layer, x, index, weights, δ) of each mixture: its tokens (n, H), the experts they go to, (n, k),
    with which weights, (n, k), and its output's gradient (or its output, without gradients), (n, H)."""

    def hook(number: int) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def forward(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x, index, weights = (t.detach() for t in inputs)
            if not gradients:
                see(number, x, index, weights, output)
            elif output.requires_grad:
                output.register_hook(lambda delta: see(number, x, index, weights, delta.detach()))

        return forward

    with ExitStack() as stack:
        for number, module in mixtures.items():
            stack.callback(module.register_forward_hook(hook(number)).remove)
        yield
