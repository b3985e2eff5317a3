"""Llama-like blocks: grouped-query attention with rotary positions, gated MLP."""

from typing import Any

from torch import nn

from .base import Family, Part


class Llama(Family):
    model_types = ("llama", "saap_llama")

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.layers  # type: ignore[union-attr, return-value]

    def parts(self, config: Any) -> dict[str, list[Part]]:
        d = config.head_dim
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

    def widths(self, config: Any, units: dict[str, int]) -> dict[str, int]:
        n_rep = config.num_attention_heads // config.num_key_value_heads
        return {
            "num_attention_heads": units["attention"] * n_rep,
            "num_key_value_heads": units["attention"],
            "intermediate_size": units["mlp"],
        }

    def uneven(self, config: Any, per_layer: dict[int, dict[str, int]]) -> nn.Module:
        from saap.modeling import SaapLlamaConfig, SaapLlamaForCausalLM

        return SaapLlamaForCausalLM(SaapLlamaConfig.from_dense(config, per_layer))
