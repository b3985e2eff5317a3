"""Baichuan-13B after `saap.models.convert_baichuan` has split its W_pack: Llama's layers, ALiBi positions."""

from typing import Any

from torch import nn

from saap.models.modeling_baichuan import SaapBaichuanConfig, SaapBaichuanForCausalLM

from .bloom import Bloom, original_heads
from .llama import Llama


class Baichuan(Llama):
    int4 = False
    rotary = False

    def __init__(self) -> None:
        super().__init__(SaapBaichuanForCausalLM)
        self.model_types = ("saap_baichuan",)

    def units(self, config: Any) -> dict[str, int]:
        return {"attention": len(original_heads(config)), "mlp": config.intermediate_size}

    widths = Bloom.widths  # heads keep their original numbers

    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        return SaapBaichuanForCausalLM(SaapBaichuanConfig.from_dense(config, per_layer))
