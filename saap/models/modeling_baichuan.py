"""Baichuan-13B, dense or with its own heads and MLP widths in each layer: Llama's layers with ALiBi for positions.

Needs only torch and transformers, so that a checkpoint can carry this file to people who do not have the package.
"""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from .modeling import UnevenConfig, UnevenModel, register


@strict
class SaapBaichuanConfig(UnevenConfig, LlamaConfig):
    """A Llama config whose positions are ALiBi.

    Per layer: `kept_heads`, the original numbers of its heads, ascending (None: all), and `intermediate_size`.
    `num_attention_heads` stays that of the dense model: it fixes the head size and the ALiBi slopes.
    """

    model_type = "saap_baichuan"
    kept_heads: list[int] | None = None


def alibi_slopes(heads: int) -> list[float]:
    """2^(−8i/n), i = 1 … n, for n = 2^k heads; what is left over takes every other slope of 2n (Press et al., 2022)."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return slopes + [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]


class SaapBaichuanAttention(LlamaAttention):
    """The heads `config.kept_heads`, each at the slope of its original number; no rotation of q and k."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = list(range(config.num_attention_heads)) if config.kept_heads is None else list(config.kept_heads)
        slopes = alibi_slopes(config.num_attention_heads)
        self.slopes = [slopes[head] for head in heads]
        hidden, width = config.hidden_size, len(heads) * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """attention_mask is added to the scores, (batch, 1, queries, keys): the model's 'eager' masks."""
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(split).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        keys = torch.arange(k.shape[2], device=k.device)
        distance = keys - keys[-q.shape[2] :, None]
        bias = torch.tensor(self.slopes, device=k.device)[:, None, None] * distance
        lowest = torch.finfo(q.dtype).min
        if attention_mask is not None:
            bias = bias + attention_mask[..., : k.shape[2]]
        # the softmax does not mind where a row starts counting, but half precision does: the nearest key has 0
        bias = bias - bias.amax(-1, keepdim=True)  # behind padding and in static caches too
        mask = bias.clamp(min=lowest).to(q.dtype)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


class SaapBaichuanBlock(LlamaDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SaapBaichuanAttention(config, layer_idx)


class SaapBaichuanForCausalLM(UnevenModel, LlamaForCausalLM):
    config_class = SaapBaichuanConfig
    layer_class = SaapBaichuanBlock
    _no_split_modules = ["SaapBaichuanBlock"]  # noqa: RUF012
    # masks must be there to add to, as only those of 'eager' always are
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False


register(SaapBaichuanForCausalLM)
