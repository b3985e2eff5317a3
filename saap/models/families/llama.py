"""Llama-like layers: grouped-query attention, gated MLP. What a family has beyond that are the arguments of its row."""

from typing import Any

from torch import nn

from saap.models.modeling import UnevenModel

from .base import Family, Part


class Llama(Family):
    """A family by the class of its uneven models, from which its model types follow.

    fused_qkv, fused_mlp: q, k and v, or gate and up, are stacked in one matrix. post_norm: what attention and MLP write
    is normalised before it joins the residual stream. joint_norms: the norms of q and k run over all heads together.
    mlp_only: layers of a hybrid, whose attention (some of it linear) is left whole.
    """

    int4 = True

    def __init__(
        self,
        model_class: type[UnevenModel],
        *,
        fused_qkv: bool = False,
        fused_mlp: bool = False,
        post_norm: bool = False,
        joint_norms: bool = False,
        mlp_only: bool = False,
    ) -> None:
        self.model_class, self.post_norm = model_class, post_norm
        self.fused_qkv, self.fused_mlp, self.has_joint_norms = fused_qkv, fused_mlp, joint_norms
        self.mlp_only = mlp_only
        self.rotary = self.rotary and not mlp_only  # linear attention reads on through a mask
        uneven = model_class.config_class.model_type
        self.model_types = (uneven.removeprefix("saap_"), uneven)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.model.layers  # type: ignore[union-attr, return-value]

    def parts(self, config: Any) -> dict[str, list[Part]]:
        d, shared = head_size(config), config.num_key_value_heads
        # transformers lays the query heads that share KV head h out next to each other
        query = (1 if by_query(config) else config.num_attention_heads // shared) * d
        if self.fused_qkv:
            inputs = [Part("self_attn.qkv_proj", 0, (d,), rest=2 * shared * d)]
            if not by_query(config):
                inputs = [Part("self_attn.qkv_proj", 0, (query, d, d))]
        else:
            inputs = [Part("self_attn.q_proj", 0, (query,))]
            if not by_query(config):
                inputs += [Part("self_attn.k_proj", 0, (d,)), Part("self_attn.v_proj", 0, (d,))]
        gated = [Part("mlp.gate_proj", 0, (1,)), Part("mlp.up_proj", 0, (1,))]
        if self.fused_mlp:
            gated = [Part("mlp.gate_up_proj", 0, (1, 1))]
        mlp = [*gated, Part("mlp.down_proj", 1, (1,))]
        if self.mlp_only:
            return {"mlp": mlp}
        return {"attention": [*inputs, Part("self_attn.o_proj", 1, (query,))], "mlp": mlp}

    def units(self, config: Any) -> dict[str, int]:
        if self.mlp_only:
            return {"mlp": config.intermediate_size}
        heads = config.num_attention_heads if by_query(config) else config.num_key_value_heads
        return {"attention": heads, "mlp": config.intermediate_size}

    def widths(self, config: Any, kept: dict[str, list[int]]) -> dict[str, Any]:
        if self.mlp_only:
            return {"intermediate_size": len(kept["mlp"])}
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        own = {"num_attention_heads": len(kept["attention"])}
        if not by_query(config):
            own = {
                "num_attention_heads": len(kept["attention"]) * (heads // shared),
                "num_key_value_heads": len(kept["attention"]),
            }
        return own | {"intermediate_size": len(kept["mlp"])}

    def uneven(self, config: Any, per_layer: dict[int, dict[str, Any]]) -> nn.Module:
        small: Any = self.model_class
        heads = "query" if by_query(config) else "kv"
        return small(small.config_class.from_dense(config, per_layer, heads=heads))

    def joint_norms(self, config: Any) -> dict[str, list[Part]]:
        if not self.has_joint_norms:
            return {}
        query, *_ = self.parts(config)["attention"]
        norms = [Part("self_attn.q_norm", 0, query.stretches)]
        if not by_query(config):
            norms.append(Part("self_attn.k_norm", 0, (head_size(config),)))
        return {"attention": norms}

    def stretches(self, config: Any) -> dict[str, int]:
        return {"attention": config.num_key_value_heads} if by_query(config) else {}

    def residual(self, config: Any) -> float:
        return float(getattr(config, "residual_multiplier", 1.0))  # Granite's

    def logits(self, config: Any) -> tuple[float, float | None]:
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere's
        return scale / getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def by_query(config: Any) -> bool:
    """Whether a group of attention is one query head, and not a KV head with its query heads.

    So it is where `config.heads` says "query", and in a model with one KV head a layer. Where each query head has a KV
    head of its own the two are the same. A pruned model goes on as it was begun.
    """
    asked = getattr(config, "heads", "kv") == "query"
    if hasattr(config, "groupwise"):  # an uneven class
        return asked
    return (asked or config.num_key_value_heads == 1) and config.num_attention_heads > config.num_key_value_heads
