"""BLOOM: q, k and v fused head by head, ALiBi positions, a plain MLP, biases everywhere."""

from typing import Any

from torch import nn

from saap.errors import SaapError
from saap.models.modeling_bloom import SaapBloomConfig, SaapBloomForCausalLM

from .base import Family, Part


class Bloom(Family):
    model_types = ("bloom", "saap_bloom")
    rotary = False

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.transformer.h  # type: ignore[union-attr, return-value]

    def parts(self, config: Any) -> dict[str, list[Part]]:
        if config.model_type == "bloom" and config.slow_but_exact and config.pretraining_tp > 1:
            raise SaapError("this BLOOM multiplies past its linear layers: set slow_but_exact to false in its config")
        d = config.hidden_size // config.num_attention_heads
        return {
            # query_key_value is laid out (heads, 3, d): the rows of one head are next to each other
            "attention": [Part("self_attention.query_key_value", 0, (3 * d,)), Part("self_attention.dense", 1, (d,))],
            "mlp": [Part("mlp.dense_h_to_4h", 0, (1,)), Part("mlp.dense_4h_to_h", 1, (1,))],
        }

    def units(self, config: Any) -> dict[str, int]:
        return {
            "attention": len(original_heads(config)),
            "mlp": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        }

    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        heads = original_heads(config)
        return {"kept_heads": [heads[unit] for unit in kept["attention"]], "intermediate_size": len(kept["mlp"])}

    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        return SaapBloomForCausalLM(SaapBloomConfig.from_dense(config, per_layer))


def original_heads(config: Any) -> list[int]:
    """The original numbers of the heads of a layer: they decide the ALiBi slopes."""
    kept = getattr(config, "kept_heads", None)
    return list(range(config.num_attention_heads)) if kept is None else kept
