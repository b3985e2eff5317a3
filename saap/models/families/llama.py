"""Llama-like blocks: grouped-query attention with rotary positions, gated MLP."""

from typing import Any

from torch import nn

from saap.models.modeling import SaapLlamaForCausalLM, UnevenModel

from .base import Family, Part


class Llama(Family):
    """Also the base of its likes: they name their own model types and uneven class, and the rest is the same."""

    model_types: tuple[str, ...] = ("llama", "saap_llama")
    int4 = True
    model_class: type[UnevenModel] = SaapLlamaForCausalLM

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.layers  # type: ignore[union-attr, return-value]

    def parts(self, config: Any) -> dict[str, list[Part]]:
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_rep = config.num_attention_heads // config.num_key_value_heads
        return {
            # transformers lays the n_rep query heads that share KV head h out next to each other, from h·n_rep on
            "attention": [
                Part("self_attn.q_proj", 0, n_rep * d),
                Part("self_attn.k_proj", 0, d),
                Part("self_attn.v_proj", 0, d),
                Part("self_attn.o_proj", 1, n_rep * d),
            ],
            "mlp": [Part("mlp.gate_proj", 0, 1), Part("mlp.up_proj", 0, 1), Part("mlp.down_proj", 1, 1)],
        }

    def units(self, config: Any) -> dict[str, int]:
        return {"attention": config.num_key_value_heads, "mlp": config.intermediate_size}

    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        n_rep = config.num_attention_heads // config.num_key_value_heads
        return {
            "num_attention_heads": len(kept["attention"]) * n_rep,
            "num_key_value_heads": len(kept["attention"]),
            "intermediate_size": len(kept["mlp"]),
        }

    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        small: Any = self.model_class
        return small(small.config_class.from_dense(config, per_layer))
