"""Mistral: Llama blocks under a sliding window, which belongs to the positions and is not sliced."""

from saap.models.modeling import SaapMistralForCausalLM

from .llama import Llama


class Mistral(Llama):
    model_types = ("mistral", "saap_mistral")
    model_class = SaapMistralForCausalLM
