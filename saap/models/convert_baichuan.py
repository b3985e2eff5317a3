"""Baichuan-7B and -13B in their published layout; the code beside the weights is never run.

Attention stacks q, k and v in one matrix, W_pack (3H, H); everything else has Llama's names and shapes. So the 7B is a
Llama; the 13B has ALiBi for positions and a class of our own.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from saap.errors import SaapError
from saap.models.modeling_baichuan import SaapBaichuanConfig
from saap.models.validation import weight_files

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
OPTIONAL = (
    "hidden_act",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def split_config(fields: dict[str, Any]) -> LlamaConfig | SaapBaichuanConfig:
    """The config for a config.json of model type 'baichuan': the 7B names its length max_position_embeddings, the 13B
    model_max_length.

    Raises SaapError for Baichuan 2, which normalises its head.
    """
    if fields["vocab_size"] == 125696:
        raise SaapError("this is a Baichuan 2, which normalises its head: Baichuan-7B and -13B can be read")
    own = {name: fields[name] for name in SHARED} | {name: fields[name] for name in OPTIONAL if name in fields}
    if "max_position_embeddings" in fields:
        return LlamaConfig(**own, max_position_embeddings=fields["max_position_embeddings"])
    return SaapBaichuanConfig(**own, max_position_embeddings=fields["model_max_length"])


def split_state(folder: Path) -> dict[str, torch.Tensor]:
    """The stored tensors under Llama's names: W_pack (3H, H) becomes q, k, v, each (H, H), in this order."""
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            if name.endswith("self_attn.W_pack.weight"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    state[name.replace("W_pack", f"{letter}_proj")] = part
            else:
                state[name] = tensor
    return state
