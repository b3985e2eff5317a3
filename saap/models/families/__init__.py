"""The architectures that can be pruned. One like Llama is a row in `FAMILIES` and a class in `modeling_families.py`."""

from typing import Any

from saap.errors import SaapError
from saap.models import modeling as llamas
from saap.models import modeling_experts as mixtures
from saap.models import modeling_families as others

from .baichuan import Baichuan
from .base import Family, Part
from .bloom import Bloom
from .experts import Experts, Layout
from .llama import Llama

FAMILIES: tuple[Family, ...] = (
    Llama(llamas.SaapLlamaForCausalLM),
    Llama(llamas.SaapMistralForCausalLM),
    Llama(llamas.SaapQwen2ForCausalLM),
    Llama(llamas.SaapQwen3ForCausalLM),
    Llama(others.SaapGemmaForCausalLM),
    Llama(others.SaapGemma2ForCausalLM, post_norm=True),
    Llama(others.SaapGemma3ForCausalLM, post_norm=True),
    Llama(others.SaapSmolLM3ForCausalLM),
    Llama(others.SaapMinistral3ForCausalLM),
    Llama(others.SaapGraniteForCausalLM),
    Llama(others.SaapPhi3ForCausalLM, fused_qkv=True, fused_mlp=True),
    Llama(others.SaapGlm4ForCausalLM, fused_mlp=True, post_norm=True),
    Llama(others.SaapOlmo2ForCausalLM, post_norm=True, joint_norms=True),
    Llama(others.SaapOlmo3ForCausalLM, post_norm=True, joint_norms=True),
    Llama(others.SaapCohere2ForCausalLM),
    Llama(others.SaapQwen35ForCausalLM, mlp_only=True),
    Experts(mixtures.SaapQwen3MoeForCausalLM, Layout("gate", "num_experts", "moe_intermediate_size", True)),
    Experts(mixtures.SaapMixtralForCausalLM, Layout("gate", "num_local_experts", "intermediate_size", True)),
    Experts(mixtures.SaapGptOssForCausalLM, Layout("router", "num_local_experts", "intermediate_size", False)),
    Bloom(),
    Baichuan(),
)


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises SaapError for a model type we do not know."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise SaapError(f"model family '{config.model_type}' is not supported; known: {known}")


__all__ = ["FAMILIES", "Experts", "Family", "Part", "family_of"]
