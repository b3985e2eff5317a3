"""A BLOOM whose layers have their own heads and MLP widths.

Needs only torch and transformers, so that a checkpoint can carry this file to people who do not have the package.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomBlock

from .modeling import UnevenConfig, UnevenModel, register


@strict
class SaapBloomConfig(UnevenConfig, BloomConfig):
    """A BLOOM config with, per layer, `kept_heads`, the original numbers of its heads, ascending, and
    `intermediate_size`, its MLP width; None stands for all heads and for 4 · hidden_size.

    `num_attention_heads` stays that of the dense model: it fixes the head size and the ALiBi slopes.
    """

    model_type = "saap_bloom"
    kept_heads: list[int] | None = None
    intermediate_size: int | None = None


class SaapBloomBlock(BloomBlock):
    """A BLOOM layer with the heads `config.kept_heads`, each at the slope of its original number.

    `slow_but_exact`, which adds the output matrices up in `pretraining_tp` equal slices, has no meaning here: off.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        attention, mlp, hidden = self.self_attention, self.mlp, config.hidden_size
        heads = list(range(config.num_attention_heads)) if config.kept_heads is None else list(config.kept_heads)
        self.original_heads, self.kept_heads = config.num_attention_heads, heads
        self.num_heads = attention.num_heads = len(heads)
        attention.slow_but_exact = mlp.slow_but_exact = False
        width = len(heads) * attention.head_dim
        attention.query_key_value = nn.Linear(hidden, 3 * width)
        attention.dense = nn.Linear(width, hidden)
        channels = 4 * hidden if config.intermediate_size is None else config.intermediate_size
        mlp.dense_h_to_4h = nn.Linear(hidden, channels)
        mlp.dense_4h_to_h = nn.Linear(channels, hidden)

    def forward(self, hidden_states: torch.Tensor, alibi: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """alibi is (batch · original heads, 1, keys), as BloomModel makes it once for all layers."""
        alibi = alibi.unflatten(0, (-1, self.original_heads))[:, self.kept_heads].flatten(0, 1)
        return super().forward(hidden_states, alibi, *args, **kwargs)


class SaapBloomForCausalLM(UnevenModel, BloomForCausalLM):
    config_class = SaapBloomConfig
    layer_class = SaapBloomBlock
    layers_path = "h"
    outputs = ("self_attention.dense", "mlp.dense_4h_to_h")
    _no_split_modules = ["SaapBloomBlock"]  # noqa: RUF012


register(SaapBloomForCausalLM)
