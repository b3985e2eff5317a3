"""Mixtures of experts: heads as in Llama, whole experts, and channels of experts (as many in all of a layer)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saap.models.modeling import UnevenModel

from .base import Part
from .llama import Llama, by_query


@dataclass(frozen=True)
class Layout:
    """Names of the fields and modules of a mixture of E experts of I channels, as transformers 5 stores them fused.

    stacked: gate_up_proj (E, 2I, H), gate above up, and down_proj (E, H, I); else (E, H, 2I), gate and up in turn, with
    biases, and (E, I, H).
    """

    router: str
    count: str
    width: str
    stacked: bool


class Experts(Llama):
    """A family with experts in all or some of its layers; the other layers (of a Qwen3-MoE) are Llama's."""

    int4 = False

    def __init__(self, model_class: type[UnevenModel], layout: Layout) -> None:
        super().__init__(model_class)
        self.layout, self.router = layout, f"mlp.{layout.router}"

    def layer_configs(self, model: nn.Module) -> list[Any]:
        """Copies that also say whether the layer has experts: `mixture`."""
        found = [copy.copy(config) for config in super().layer_configs(model)]
        for number, config in enumerate(found):
            config.mixture = self.has_experts(config, number)
        return found

    def has_experts(self, config: Any, number: int) -> bool:
        """Whether layer `number`, whose config this is, has experts: by the fields of Qwen3-MoE, which others lack."""
        step = getattr(config, "decoder_sparse_step", 1)
        return number not in getattr(config, "mlp_only_layers", ()) and (number + 1) % step == 0

    def mixtures(self, model: nn.Module) -> dict[int, Any]:
        """Number of a layer with experts → their module."""
        layers: Any = self.layers(model)
        return {i: layers[i].mlp.experts for i, own in enumerate(self.layer_configs(model)) if own.mixture}

    def parts(self, config: Any) -> dict[str, list[Part]]:
        parts = super().parts(config)
        return {"attention": parts["attention"]} if config.mixture else parts

    def units(self, config: Any) -> dict[str, int]:
        units = super().units(config)
        if not config.mixture:
            return units
        experts, width = getattr(config, self.layout.count), getattr(config, self.layout.width)
        return {"attention": units["attention"], "expert": experts, "mlp": experts * width}

    def sizes(self, layer: nn.Module) -> dict[str, int]:
        """kind → parameters of one group: of an expert what is not of its channels, which are groups too."""
        router, experts = layer.get_submodule(self.router), layer.get_submodule("mlp.experts")
        own = sum(parameter[0].numel() for parameter in router.parameters())
        biases = getattr(experts, "down_proj_bias", None)
        channel = sum(
            parameter[0].numel() for name, parameter in experts.named_parameters() if name != "down_proj_bias"
        ) // self.width(experts)
        return {"expert": own + (0 if biases is None else biases.shape[1]), "mlp": channel}

    def width(self, experts: nn.Module) -> int:
        down: Any = experts.down_proj
        return int(down.shape[2 if self.layout.stacked else 1])

    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        own = super().widths(config, kept)
        if not config.mixture:
            return own
        own.pop("intermediate_size")
        return own | {
            self.layout.count: len(kept["expert"]),
            self.layout.width: len(kept["mlp"]) // len(kept["expert"]),
        }

    def vectors(self, config: Any) -> dict[str, list[Part]]:
        if self.layout.stacked:
            return {}
        heads = 1 if by_query(config) else config.num_attention_heads // config.num_key_value_heads
        return {"attention": [Part("self_attn.sinks", 0, (heads,))]}  # gpt-oss: one a query head

    def stretches(self, config: Any) -> dict[str, int]:
        own = super().stretches(config)
        return own | {"mlp": getattr(config, self.layout.count)} if config.mixture else own

    def cut(self, layer: nn.Module, experts: torch.Tensor, channels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name in the layer → tensor, with these experts (n,) and of each these units (n, c) of kind 'mlp', int64."""
        channels = channels % self.width(layer.get_submodule("mlp.experts"))
        state: dict[str, torch.Tensor] = {}
        for name, parameter in layer.get_submodule(self.router).named_parameters():
            state[f"{self.router}.{name}"] = parameter[experts]
        for name, parameter in layer.get_submodule("mlp.experts").named_parameters():
            pieces = [self._cut_one(name, parameter[int(e)], own) for e, own in zip(experts, channels, strict=True)]
            state[f"mlp.experts.{name}"] = torch.stack(pieces)
        return state

    def _cut_one(self, name: str, tensor: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        if name == "down_proj_bias":
            return tensor
        if name == "down_proj":
            return tensor[:, channels] if self.layout.stacked else tensor[channels]
        if self.layout.stacked:
            return tensor.unflatten(0, (2, -1))[:, channels].flatten(0, 1)
        return tensor.unflatten(-1, (-1, 2))[..., channels, :].flatten(-2)

    def by_expert(
        self, layer: nn.Module, of: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of `of` over the weights (biases apart), float64: of each expert's router row (E,), of channels (E, I).

        of: any function of one weight, in float32.
        """
        router: Any = layer.get_submodule(self.router)
        experts: Any = layer.get_submodule("mlp.experts")
        inputs, outputs = of(experts.gate_up_proj.float()), of(experts.down_proj.float())
        stacked = self.layout.stacked
        channels = inputs.sum(2 if stacked else 1, dtype=torch.float64)
        channels = channels.unflatten(1, (2, -1) if stacked else (-1, 2)).sum(1 if stacked else 2)
        channels = channels + outputs.sum(1 if stacked else 2, dtype=torch.float64)
        return of(router.weight.float()).sum(1, dtype=torch.float64), channels

    def activations(self, experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What enters the down_proj of one expert, (tokens, I), for x (tokens, H)."""
        return self.gated(experts, self.gate_and_up(experts, expert, x))

    def gate_and_up(self, experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What comes out of gate_up_proj of one expert, (tokens, 2I), as it is stored."""
        if self.layout.stacked:
            return nn.functional.linear(x, experts.gate_up_proj[expert])
        found: torch.Tensor = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        return found

    def gated(self, experts: Any, both: torch.Tensor) -> torch.Tensor:
        """(tokens, 2I) of gate_up_proj → (tokens, I)."""
        if self.layout.stacked:
            gate, up = both.chunk(2, dim=-1)
            found: torch.Tensor = experts.act_fn(gate) * up
        else:
            found = experts._apply_gate(both)
        return found

    def down(self, experts: Any, expert: int) -> torch.Tensor:
        """down_proj of one expert as a matrix (I, H): a view."""
        weight: torch.Tensor = experts.down_proj[expert]
        return weight.T if self.layout.stacked else weight
