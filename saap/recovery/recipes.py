"""What is trained to recover a pruned model: three ways to prepare it, and to make a plain checkpoint of the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saap.errors import SaapError
from saap.int4.adapter import add_adapters, merge_adapters
from saap.int4.quantize import to_groupwise
from saap.models.families import family_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Low-rank adapters on the linear layers of the decoder layers; everything else is frozen.

    rank, alpha: adapters are scaled by alpha / rank. targets: the last names of the layers that get one ("q_proj", …);
    all if empty.
    """

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def prepare(self, model: Any, tokens: torch.Tensor) -> Any:
        """The model to train, from a float model, which is used up. What is to learn has `requires_grad`.

        tokens: int64 (D, T), some of the text it is to be trained on.
        """
        raise NotImplementedError

    def finish(self, model: Any) -> Any:
        """A plain model with the adapters merged, in eval mode."""
        raise NotImplementedError

    def layers(self, model: Any) -> Iterator[tuple[str, nn.Linear]]:
        """(path, layer) of every linear layer of the decoder layers. Raises SaapError when a target is none of them."""
        family = family_of(model.config)
        layers = {id(m) for layer in family.layers(model) for m in layer.modules() if isinstance(m, nn.Linear)}
        found = [(name, module) for name, module in model.named_modules() if id(module) in layers]
        names = sorted({name.rpartition(".")[2] for name, _ in found})
        unknown = sorted(set(self.targets) - set(names))
        if unknown:
            raise SaapError(f"no layer is called {', '.join(unknown)}: recover.targets may name {', '.join(names)}")
        if self.rank < 1 or self.alpha <= 0:
            raise SaapError(f"rank and alpha must be positive, got {self.rank} and {self.alpha}")
        yield from found

    def aims_at(self, path: str) -> bool:
        return not self.targets or path.rpartition(".")[2] in self.targets


@dataclass(frozen=True, kw_only=True)
class Groupwise(Recipe):
    """Group-wise codes with float zeros, which take up the adapters exactly (SAAP §III-D).

    rounding: "nearest", each weight to the code next to it, as in the paper, or "feedback", so that the codes make up
    for each other's rounding on the text they are trained on (`quantize_with_feedback`).
    """

    bits: int = 4
    group_size: int | None = 32
    groups: int | None = None
    rounding: str = "nearest"

    def prepare(self, model: Any, tokens: torch.Tensor) -> Any:
        list(self.layers(model))
        if self.rounding not in ("nearest", "feedback"):
            raise SaapError(f"rounding must be nearest or feedback, got {self.rounding!r}")
        size = self.group_size if self.groups is None else None
        text = tokens if self.rounding == "feedback" else None
        small = to_groupwise(model, size, bits=self.bits, groups=self.groups, tokens=text, consume=True)
        add_adapters(small, self.rank, self.alpha, self.aims_at)
        return small

    def finish(self, model: Any) -> Any:
        return merge_adapters(model).eval()


@dataclass(frozen=True, kw_only=True)
class Lora(Recipe):
    """LoRA (arXiv 2106.09685) on the float weights, by peft, merged into them."""

    def prepare(self, model: Any, tokens: torch.Tensor) -> Any:
        from peft import LoraConfig, inject_adapter_in_model

        targets = [path for path, _ in self.layers(model) if self.aims_at(path)]
        model.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float will do
            lora_dropout=0.0,
            target_modules=targets,
        )
        model = inject_adapter_in_model(config, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    @torch.no_grad()
    def finish(self, model: Any) -> Any:
        from peft.tuners.lora import LoraLayer

        dtype = model.get_output_embeddings().weight.dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                layer: Any = module
                base = layer.get_base_layer()
                weight = _float_weight(base).float() + layer.get_delta_weight("default").float()
                model.set_submodule(path, _linear(weight.to(dtype), base.bias))
        return model.eval()


@dataclass(frozen=True, kw_only=True)
class Qlora(Lora):
    """QLoRA (arXiv 2305.14314): LoRA over bitsandbytes' NF4 with quantised scales.

    What comes out is a float checkpoint, the dequantised weights with the adapters merged: rounding them to NF4 again
    would lose what was learned.
    """

    def prepare(self, model: Any, tokens: torch.Tensor) -> Any:
        from saap.recovery.nf4 import to_nf4

        for path, module in list(self.layers(model)):
            model.set_submodule(path, to_nf4(module))
        model.is_loaded_in_4bit = True  # how peft knows
        return super().prepare(model, tokens)

    @torch.no_grad()
    def finish(self, model: Any) -> Any:
        model = super().finish(model)
        del model.is_loaded_in_4bit
        dtype = model.get_output_embeddings().weight.dtype
        for path, module in list(model.named_modules()):
            if hasattr(getattr(module, "weight", None), "quant_state"):
                model.set_submodule(path, _linear(_float_weight(module).to(dtype), module.bias))
        return model


RECIPES: dict[str, type[Recipe]] = {"groupwise": Groupwise, "lora": Lora, "qlora": Qlora}


def _float_weight(layer: Any) -> torch.Tensor:
    if not hasattr(layer.weight, "quant_state"):
        return layer.weight.data
    from saap.recovery.nf4 import from_nf4

    return from_nf4(layer)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
