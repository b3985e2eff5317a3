"""A model's residual stream, layer by layer: what each layer gets and gives on the calibration text."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomBlock

from saap.models.families import Experts, family_of
from saap.models.groups import KINDS, layer_parts
from saap.models.offload import input_device


class Pass:
    """One batch through one layer. x, y: kind → input and output of its output matrix. out: what the layer gives.

    routed: in a layer with experts what they get: tokens (n, H), the experts these go to (n, k), their weights (n, k).
    """

    out: torch.Tensor
    routed: tuple[torch.Tensor, ...] = ()

    def __init__(self) -> None:
        self.x: dict[str, torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}

    def watch(self, kind: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def hook(linear: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            self.x[kind], self.y[kind] = inputs[0], output

        return hook

    def watch_experts(self, module: nn.Module, inputs: tuple) -> None:
        self.routed = inputs


class Stream:
    """The residual stream of a model in front of a layer, for each batch of tokens."""

    states: list[torch.Tensor]

    def __init__(self, model: nn.Module, tokens: torch.Tensor, batch_size: int) -> None:
        model.eval()
        family = family_of(model.config)
        self.layers = family.layers(model)
        self.mixtures = family.mixtures(model) if isinstance(family, Experts) else {}
        outputs = {
            (layer, kind): next((part, linear) for part, linear in members if part.axis == 1)
            for layer, kinds in enumerate(layer_parts(model))
            for kind, members in kinds.items()
        }
        self.matrices = {structure: linear for structure, (_, linear) in outputs.items()}
        self.widths = {structure: part.width for structure, (part, _) in outputs.items()}  # columns a unit
        self.states, self.arguments = [], []
        device = input_device(model)
        for batch in tokens.split(batch_size):
            states, arguments = _enter(model, self.layers, batch.to(device))
            self.states.append(states)
            self.arguments.append(arguments)

    def through(
        self, layer: int, without: Mapping[str, torch.Tensor] | None = None, until: str | None = None
    ) -> Iterator[Pass]:
        """The layer on batch after batch. The states in front of it stay. A pass is large: keep what you need of it.

        without: kind → int64 (removed,), units of the layer that write nothing, as if they were pruned.
        until: a kind, behind whose output matrix the pass ends. It then has no `out`.
        """
        for states, arguments in zip(self.states, self.arguments, strict=True):
            args, kwargs = arguments[layer]
            seen = Pass()
            with ExitStack() as stack, suppress(_Reached):
                for kind, units in (without or {}).items():
                    silence = _silence(units, self.widths[layer, kind])
                    stack.callback(self.matrices[layer, kind].register_forward_pre_hook(silence).remove)
                for kind in (kind for kind in KINDS if (layer, kind) in self.matrices):
                    stack.callback(self.matrices[layer, kind].register_forward_hook(seen.watch(kind)).remove)
                if until is not None:
                    stack.callback(self.matrices[layer, until].register_forward_hook(_end).remove)
                if layer in self.mixtures:
                    stack.callback(self.mixtures[layer].register_forward_pre_hook(seen.watch_experts).remove)
                out = self.layers[layer](states, *args, **kwargs)
                seen.out = out[0] if isinstance(out, tuple) else out
            yield seen


class _Reached(Exception):
    """A pass is where it was to end."""


def _end(*_: Any) -> None:
    raise _Reached


def _silence(units: torch.Tensor, width: int) -> Callable[[nn.Module, tuple], torch.Tensor]:
    """A hook that zeroes the inputs of an output matrix that belong to these units."""

    def hook(linear: nn.Module, inputs: tuple) -> torch.Tensor:
        x: torch.Tensor = inputs[0].clone()
        x.unflatten(-1, (-1, width))[..., units.to(x.device), :] = 0
        return x

    return hook


def _enter(model: nn.Module, layers: nn.ModuleList, batch: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """The first layer's input, and the other arguments (masks, positions) the model gives each layer.

    The layers do not run: for this one call they give their input back.
    """
    seen: list[tuple[torch.Tensor, tuple, dict]] = []

    def hand_on(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((states, args, kwargs))
        return (states, None) if isinstance(layers[0], BloomBlock) else states

    own = [layer.__dict__.get("forward") for layer in layers]  # accelerate's, around the class's
    for layer in layers:
        layer.forward = hand_on
    try:
        model.base_model(batch, use_cache=False)  # type: ignore[operator]
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return seen[0][0], [(args, kwargs) for _, args, kwargs in seen]
