"""Llama-like models whose layers have their own widths, in float or in group-wise int4.

Needs only torch and transformers, so that a checkpoint can carry this file, and the one it imports, to people who do
not have the package.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .modeling_groupwise import use_groupwise


@dataclass(kw_only=True, repr=False, eq=False)
class UnevenConfig:
    """A mixin in front of a dense config class, for layers with their own widths.

    `per_layer_config` is transformers' own layout. `groupwise` is `{"bits": b, "group_size": G}`,
    `{"bits": b, "groups": L}` or None (float weights). `output_bias` says whether o_proj and down_proj each have a
    bias: the mean of what was pruned. `heads` says what a coupled group of attention is: a KV head with its query heads
    ("kv"), or one query head ("query").
    """

    groupwise: dict | None = None
    output_bias: bool = False
    heads: str = "kv"

    def validate_architecture(self) -> None:
        """The heads need not add up to the hidden size, because `head_dim` is explicit."""

    @classmethod
    def from_dense(cls, config: Any, per_layer: dict[int, dict[str, Any]], **more: Any) -> Any:
        fields = config.to_dict() | more
        for name in ("model_type", "architectures", "per_layer_config", "transformers_version", "auto_map"):
            fields.pop(name, None)
        if fields.get("head_dim") is None:
            fields["head_dim"] = config.hidden_size // config.num_attention_heads
        fields["per_layer_config"] = {layer: dict(widths) for layer, widths in per_layer.items()}
        return cls(**fields)


class UnevenModel:
    """A mixin in front of a dense causal model class: layer i is a `layer_class` of `config.per_layer_config[i]`."""

    config_class: Any
    layer_class: Any
    layers_path = "layers"  # in the base model
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")  # in a layer
    headless: str | None = None  # the class without a head, as auto_map names it

    def __init__(self: Any, config: Any) -> None:
        # everything but the layers has one width: build it from a configuration without layers
        frame: Any = copy.copy(config.per_layer_config[0])
        frame.num_hidden_layers = 0
        super().__init__(frame)  # type: ignore[call-arg]
        config._attn_implementation = frame._attn_implementation
        self.config = self.base_model.config = config
        if self.headless and not getattr(config, "auto_map", None):
            config.auto_map = {"AutoModel": self.headless}
        layers = self.base_model.get_submodule(self.layers_path)
        for index, layer_config in enumerate(config.per_layer_config):
            layers.append(self.layer_class(layer_config, index))
        if config.output_bias:
            for linear in (layer.get_submodule(path) for layer in layers for path in self.outputs):
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        if config.groupwise:
            use_groupwise(layers, **config.groupwise)
        self.post_init()

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers. The layers have configurations of their own, which must agree with the masks."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for module in self.base_model.get_submodule(self.layers_path).modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = self.config._attn_implementation


def register(*models: Any) -> None:
    """Register with transformers' Auto classes; save_pretrained copies the file of the class into the checkpoint.

    It also copies the files that this one imports by a relative name, and names the class in config.json's auto_map. A
    class of the model without its head is put beside each: vLLM's Transformers backend makes that.
    """
    for model in models:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        if issubclass(model, UnevenModel):
            stock: Any = next(MODEL_MAPPING[kind] for kind in model.config_class.__mro__[1:] if kind in MODEL_MAPPING)
            mixins = [base for base in model.__bases__ if issubclass(base, UnevenModel)]
            name = model.__name__.replace("ForCausalLM", "Model")
            headless: Any = type(name, (*mixins, stock), {**vars(model), "headless": None})
            setattr(sys.modules[model.__module__], name, headless)
            AutoModel.register(model.config_class, headless, exist_ok=True)
            model.headless = f"{model.__module__.rpartition('.')[2]}.{name}"
        model.config_class.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")


@strict
class SaapLlamaConfig(UnevenConfig, LlamaConfig):
    model_type = "saap_llama"


class SaapLlamaForCausalLM(UnevenModel, LlamaForCausalLM):
    config_class = SaapLlamaConfig
    layer_class = LlamaDecoderLayer


@strict
class SaapMistralConfig(UnevenConfig, MistralConfig):
    model_type = "saap_mistral"


class SaapMistralForCausalLM(UnevenModel, MistralForCausalLM):
    config_class = SaapMistralConfig
    layer_class = MistralDecoderLayer


@strict
class SaapQwen2Config(UnevenConfig, Qwen2Config):
    model_type = "saap_qwen2"


class SaapQwen2ForCausalLM(UnevenModel, Qwen2ForCausalLM):
    config_class = SaapQwen2Config
    layer_class = Qwen2DecoderLayer


@strict
class SaapQwen3Config(UnevenConfig, Qwen3Config):
    model_type = "saap_qwen3"


class SaapQwen3ForCausalLM(UnevenModel, Qwen3ForCausalLM):
    config_class = SaapQwen3Config
    layer_class = Qwen3DecoderLayer


register(SaapLlamaForCausalLM, SaapMistralForCausalLM, SaapQwen2ForCausalLM, SaapQwen3ForCausalLM)
