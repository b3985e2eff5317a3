"""What experts and their channels give: the Fisher information of their masks, and REAP's router-weighted norm."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from saap.errors import SaapError
from saap.models.families import Experts, family_of
from saap.models.groups import layer_parts
from saap.progress import tqdm
from saap.scoring.backward import backward, input_device, watch_gradients

See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def reap(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> list[np.ndarray]:
    """Per layer, float64 (E,): the mean over the tokens that an expert gets of router weight · ‖its output‖₂.

    The router-weighted expert activation norm of Lasby et al. (REAP, arXiv 2510.13999, eq. 9): what a token loses, to
    first order, when the expert is gone. 0 for an expert that gets no token of the calibration text.
    """
    family, layers = _family(model)
    sums = [np.zeros(_experts(layer).num_experts) for layer in layers]
    counts = [np.zeros_like(total) for total in sums]

    def see(layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, _: torch.Tensor) -> None:
        module = _experts(layers[layer])
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            out = family.activations(module, expert, x[token]) @ family.down(module, expert)
            if not family.layout.stacked:
                out = out + module.down_proj_bias[expert]
            norm = weights[token, place].double() * out.double().norm(dim=1)
            sums[layer][expert] += norm.sum().item()
            counts[layer][expert] += len(token)

    with _watch(layers, see, gradients=False), tqdm(total=len(tokens), desc="reap", unit="sample") as bar:
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)  # type: ignore[operator]
            bar.update(len(batch))
    return [total / np.maximum(count, 1) for total, count in zip(sums, counts, strict=True)]


def expert_fisher(model: nn.Module, tokens: torch.Tensor, *, batch_size: int = 4) -> np.ndarray:
    """`saap.mask_fisher` of a mixture of experts: float64 (N,), heads, experts and channels in the order of `discover`.

    The mask of an expert is on its output times the router's weight, that of a channel on what it gives to that. The
    router stays as it is: that its tokens go to other experts when one is gone is not counted.
    """
    model.eval()
    family, layers = _family(model)
    parts = [next((part, linear) for part, linear in own["attention"] if part.axis == 1) for own in layer_parts(model)]
    heads = [torch.zeros(linear.in_features // part.width, dtype=torch.float64) for part, linear in parts]
    whole = [torch.zeros(_experts(layer).num_experts, dtype=torch.float64) for layer in layers]
    inside = [torch.zeros(len(own), family.width(_experts(layer)), dtype=torch.float64)
              for own, layer in zip(whole, layers, strict=True)]  # fmt: skip
    length = tokens.shape[1]

    def see_heads(number: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        part, linear = parts[number]
        z = (x.float() * (delta @ linear.weight).float()).unflatten(-1, (-1, part.width)).sum((1, -1))
        heads[number] += z.square().sum(0).double().cpu()

    def see(layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, delta: torch.Tensor) -> None:
        module = _experts(layers[layer])
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            weighted = delta[token] * weights[token, place, None]
            z = (
                family.activations(module, expert, x[token]).float()
                * (weighted @ family.down(module, expert).T).float()
            )
            samples = torch.zeros(len(x) // length, z.shape[1], device=z.device).index_add_(0, token // length, z)
            each = samples.sum(1)
            if not family.layout.stacked:
                bias = (weighted @ module.down_proj_bias[expert]).float()
                each = each.index_add(0, token // length, bias)
            inside[layer][expert] += samples.square().sum(0).double().cpu()
            whole[layer][expert] += each.square().sum().double().cpu()

    with ExitStack() as stack:
        stack.enter_context(_watch(layers, see, gradients=True))
        stack.enter_context(watch_gradients([linear for _, linear in parts], see_heads))
        for batch in tqdm(tokens.split(batch_size), desc="fisher", unit="batch"):
            backward(model, batch)
    found = torch.cat([t.flatten() for own in zip(heads, whole, inside, strict=True) for t in own]) / len(tokens)
    if not found.isfinite().all():
        raise SaapError("the Fisher information of an expert is not finite: load the model in float32")
    return found.numpy()


def _family(model: nn.Module) -> tuple[Experts, nn.ModuleList]:
    family = family_of(model.config)
    if not isinstance(family, Experts):
        raise SaapError(f"a {model.config.model_type} has no experts")  # type: ignore[union-attr]
    return family, family.layers(model)


def _experts(layer: nn.Module):  # type: ignore[no-untyped-def]
    return layer.get_submodule("mlp.experts")


@contextmanager
def _watch(layers: nn.ModuleList, see: See, gradients: bool) -> Iterator[None]:
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
        for number, layer in enumerate(layers):
            stack.callback(_experts(layer).register_forward_hook(hook(number)).remove)
        yield
