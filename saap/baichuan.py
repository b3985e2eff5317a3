"""Baichuan-7B in its published layout, read as the Llama it is; the code beside the weights is never run.

Its attention stacks q, k and v in one matrix, W_pack (3H, H); everything else has Llama's names and shapes.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from saap.errors import SaapError

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
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


def llama_config(fields: dict[str, Any]) -> LlamaConfig:
    """The Llama config for a config.json of model type 'baichuan'.

    Raises SaapError for its relatives that are no Llamas: the 13B (ALiBi) and Baichuan 2 (normalised head).
    """
    if "max_position_embeddings" not in fields or fields.get("hidden_size") == 5120:
        raise SaapError("this Baichuan has ALiBi positions (the 13B): only Baichuan-7B can be read")
    if fields["vocab_size"] == 125696:
        raise SaapError("this is a Baichuan 2, which normalises its head: only Baichuan-7B can be read")
    own = {name: fields[name] for name in SHARED} | {name: fields[name] for name in OPTIONAL if name in fields}
    return LlamaConfig(**own)


def llama_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of *.safetensors under Llama's names: W_pack (3H, H) becomes q, k, v, each (H, H), in this order."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith("self_attn.W_pack.weight"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    state[name.replace("W_pack", f"{letter}_proj")] = part
            else:
                state[name] = tensor
    return state
