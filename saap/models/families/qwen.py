"""Qwen2 and dense Qwen3: Llama blocks with q/k/v biases, or with norms of q and k that all heads share."""

from saap.models.modeling import SaapQwen2ForCausalLM, SaapQwen3ForCausalLM

from .llama import Llama


class Qwen2(Llama):
    model_types = ("qwen2", "saap_qwen2")
    model_class = SaapQwen2ForCausalLM


class Qwen3(Llama):
    model_types = ("qwen3", "saap_qwen3")
    model_class = SaapQwen3ForCausalLM
