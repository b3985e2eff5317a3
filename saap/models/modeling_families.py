"""More families with layers like Llama's, each layer with its own widths. Needs `modeling.py` beside it.

Needs only torch and transformers, so that a checkpoint can carry both files to people who do not have the package.
"""

from huggingface_hub.dataclasses import strict
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.cohere2.modeling_cohere2 import Cohere2DecoderLayer
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.olmo3.modeling_olmo3 import Olmo3DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .modeling import UnevenConfig, UnevenModel, register


@strict
class SaapGemmaConfig(UnevenConfig, GemmaConfig):
    model_type = "saap_gemma"


class SaapGemmaForCausalLM(UnevenModel, GemmaForCausalLM):
    config_class = SaapGemmaConfig
    layer_class = GemmaDecoderLayer


@strict
class SaapGemma2Config(UnevenConfig, Gemma2Config):
    model_type = "saap_gemma2"


class SaapGemma2ForCausalLM(UnevenModel, Gemma2ForCausalLM):
    config_class = SaapGemma2Config
    layer_class = Gemma2DecoderLayer


@strict
class SaapGemma3Config(UnevenConfig, Gemma3TextConfig):
    model_type = "saap_gemma3_text"


class SaapGemma3ForCausalLM(UnevenModel, Gemma3ForCausalLM):
    config_class = SaapGemma3Config
    layer_class = Gemma3DecoderLayer


@strict
class SaapSmolLM3Config(UnevenConfig, SmolLM3Config):
    model_type = "saap_smollm3"


class SaapSmolLM3ForCausalLM(UnevenModel, SmolLM3ForCausalLM):
    config_class = SaapSmolLM3Config
    layer_class = SmolLM3DecoderLayer


@strict
class SaapMinistral3Config(UnevenConfig, Ministral3Config):
    model_type = "saap_ministral3"


class SaapMinistral3ForCausalLM(UnevenModel, Ministral3ForCausalLM):
    config_class = SaapMinistral3Config
    layer_class = Ministral3DecoderLayer


@strict
class SaapGraniteConfig(UnevenConfig, GraniteConfig):
    model_type = "saap_granite"


class SaapGraniteForCausalLM(UnevenModel, GraniteForCausalLM):
    config_class = SaapGraniteConfig
    layer_class = GraniteDecoderLayer


@strict
class SaapPhi3Config(UnevenConfig, Phi3Config):
    model_type = "saap_phi3"

    def validate_rope(self) -> None:
        """Nothing to check: the dense model was checked, and its heads have the same size."""


class SaapPhi3ForCausalLM(UnevenModel, Phi3ForCausalLM):
    config_class = SaapPhi3Config
    layer_class = Phi3DecoderLayer


@strict
class SaapGlm4Config(UnevenConfig, Glm4Config):
    model_type = "saap_glm4"


class SaapGlm4ForCausalLM(UnevenModel, Glm4ForCausalLM):
    config_class = SaapGlm4Config
    layer_class = Glm4DecoderLayer


@strict
class SaapOlmo2Config(UnevenConfig, Olmo2Config):
    model_type = "saap_olmo2"


class SaapOlmo2ForCausalLM(UnevenModel, Olmo2ForCausalLM):
    config_class = SaapOlmo2Config
    layer_class = Olmo2DecoderLayer


@strict
class SaapOlmo3Config(UnevenConfig, Olmo3Config):
    model_type = "saap_olmo3"


class SaapOlmo3ForCausalLM(UnevenModel, Olmo3ForCausalLM):
    config_class = SaapOlmo3Config
    layer_class = Olmo3DecoderLayer


@strict
class SaapCohere2Config(UnevenConfig, Cohere2Config):
    model_type = "saap_cohere2"


class SaapCohere2ForCausalLM(UnevenModel, Cohere2ForCausalLM):
    config_class = SaapCohere2Config
    layer_class = Cohere2DecoderLayer


@strict
class SaapQwen35Config(UnevenConfig, Qwen3_5TextConfig):
    model_type = "saap_qwen3_5_text"


class SaapQwen35ForCausalLM(UnevenModel, Qwen3_5ForCausalLM):
    """Only MLP widths differ: attention, three quarters of it linear, is that of the dense model."""

    config_class = SaapQwen35Config
    layer_class = Qwen3_5DecoderLayer
    outputs = ("mlp.down_proj",)


register(
    SaapGemmaForCausalLM,
    SaapGemma2ForCausalLM,
    SaapGemma3ForCausalLM,
    SaapSmolLM3ForCausalLM,
    SaapMinistral3ForCausalLM,
    SaapGraniteForCausalLM,
    SaapPhi3ForCausalLM,
    SaapGlm4ForCausalLM,
    SaapOlmo2ForCausalLM,
    SaapOlmo3ForCausalLM,
    SaapCohere2ForCausalLM,
    SaapQwen35ForCausalLM,
)
