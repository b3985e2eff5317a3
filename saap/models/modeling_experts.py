"""Mixtures of experts with their own numbers of heads, experts and channels of an expert in each layer.

Needs only torch and transformers, so that a checkpoint can carry this file and `modeling.py` to people who do not have
the package.
"""

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


@strict
class SaapQwen3MoeConfig(UnevenConfig, Qwen3MoeConfig):
    model_type = "saap_qwen3_moe"


class SaapQwen3MoeForCausalLM(UnevenModel, Qwen3MoeForCausalLM):
    config_class = SaapQwen3MoeConfig
    layer_class = Qwen3MoeDecoderLayer


@strict
class SaapMixtralConfig(UnevenConfig, MixtralConfig):
    model_type = "saap_mixtral"


class SaapMixtralForCausalLM(UnevenModel, MixtralForCausalLM):
    config_class = SaapMixtralConfig
    layer_class = MixtralDecoderLayer


@strict
class SaapGptOssConfig(UnevenConfig, GptOssConfig):
    model_type = "saap_gpt_oss"


class SaapGptOssForCausalLM(UnevenModel, GptOssForCausalLM):
    config_class = SaapGptOssConfig
    layer_class = GptOssDecoderLayer


register(SaapQwen3MoeForCausalLM, SaapMixtralForCausalLM, SaapGptOssForCausalLM)
