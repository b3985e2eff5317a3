"""Mixtures of experts with their own numbers of heads, experts and channels of an expert in each layer.

Needs only torch and transformers, so that a checkpoint can carry this file and `modeling.py` to people who do not have
the package.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from .modeling import UnevenConfig, UnevenModel, register


class UnevenMixture(UnevenModel):
    """Its layers compute their experts as the model's config says, where their widths allow it."""

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)
        config.output_router_logits = False  # the loss that balances experts takes one number of them for all layers
        self.set_experts_implementation(self.get_correct_experts_implementation(config._experts_implementation))

    def set_experts_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers. torch's grouped product takes rows of whole 16 bytes: others are computed eagerly."""
        super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]
        for module in self.modules():
            if hasattr(module, "num_experts") and hasattr(module, "down_proj"):
                whole = all(size % 8 == 0 for size in module.down_proj.shape[1:])
                wanted = self.config._experts_implementation
                module.config._experts_implementation = wanted if whole or wanted != "grouped_mm" else "eager"


@strict
class SaapQwen3MoeConfig(UnevenConfig, Qwen3MoeConfig):
    model_type = "saap_qwen3_moe"


class SaapQwen3MoeForCausalLM(UnevenMixture, Qwen3MoeForCausalLM):
    config_class = SaapQwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer


@strict
class SaapMixtralConfig(UnevenConfig, MixtralConfig):
    model_type = "saap_mixtral"


class SaapMixtralForCausalLM(UnevenMixture, MixtralForCausalLM):
    config_class = SaapMixtralConfig
    layer_class = MixtralDecoderLayer


@strict
class SaapGptOssConfig(UnevenConfig, GptOssConfig):
    model_type = "saap_gpt_oss"


class SaapGptOssForCausalLM(UnevenMixture, GptOssForCausalLM):
    config_class = SaapGptOssConfig
    layer_class = GptOssDecoderLayer


register(SaapQwen3MoeForCausalLM, SaapMixtralForCausalLM, SaapGptOssForCausalLM)
