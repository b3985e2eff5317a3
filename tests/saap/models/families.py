"""The families as tests make them: small random models of transformers' own classes."""

import copy
import json

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from saap import discover
from saap.models.modeling_baichuan import SaapBaichuanConfig, SaapBaichuanForCausalLM

IDS = torch.randint(3, 512, (3, 13), generator=torch.Generator().manual_seed(2))
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
LAYERS = 4
SMALL = {"vocab_size": 512, "hidden_size": 64, "initializer_range": 0.1, "eos_token_id": 2}
GATED = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
GATED |= {"max_position_embeddings": 256}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}

LLAMA_LIKE = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "mistral": (MistralForCausalLM, MistralConfig, GATED | {"sliding_window": None}),
    "mistral, sliding window, one KV head": (
        MistralForCausalLM,
        MistralConfig,
        GATED | {"sliding_window": 5, "num_key_value_heads": 1},
    ),
    "mistral, wide heads": (MistralForCausalLM, MistralConfig, GATED | {"head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GATED | {"tie_word_embeddings": True}),
    "qwen2, layer types": (Qwen2ForCausalLM, Qwen2Config, GATED | WINDOW),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GATED | {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3, layer types, biases": (
        Qwen3ForCausalLM,
        Qwen3Config,
        GATED | WINDOW | {"head_dim": 16, "attention_bias": True},
    ),
}
GEMMA = GATED | {"head_dim": 24, "hidden_activation": "gelu_pytorch_tanh"}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
NOT_ALL = {"layer_types": LAYER_TYPES, "sliding_window": 5}
OTHERS = {
    "gemma": (GemmaForCausalLM, GemmaConfig, GEMMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA | NOT_ALL | {"final_logit_softcapping": 3.0}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA | NOT_ALL),
    "gemma3, one KV head, capped": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GEMMA | NOT_ALL | {"num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, GATED | {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 2}),
    "smollm3, window": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        GATED | NOT_ALL | {"use_sliding_window": True, "pad_token_id": 2, "no_rope_layers": [0, 1, 1, 0]},
    ),
    "ministral3": (Ministral3ForCausalLM, Ministral3Config, GATED | {"head_dim": 24, "sliding_window": 5}),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        GATED
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, GATED | {"pad_token_id": 2}),
    "phi3, partial rope, one KV head": (
        Phi3ForCausalLM,
        Phi3Config,
        GATED | {"pad_token_id": 2, "partial_rotary_factor": 0.5, "num_key_value_heads": 1},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, GATED | {"head_dim": 16, "pad_token_id": 2}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, GATED | {"pad_token_id": 2}),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config, GATED | NOT_ALL | {"pad_token_id": 2}),
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        GATED
        | {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "pad_token_id": 2},
    ),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, GATED | NOT_ALL | {"logit_scale": 0.5, "pad_token_id": 2}),
}
BY_QUERY = {
    "llama, by query heads": (LlamaForCausalLM, LlamaConfig, GATED | {"num_attention_heads": 8, "heads": "query"}),
    "phi3, by query heads": (
        Phi3ForCausalLM,
        Phi3Config,
        GATED | {"num_attention_heads": 8, "heads": "query", "pad_token_id": 2},
    ),
    "olmo2, by query heads": (
        Olmo2ForCausalLM,
        Olmo2Config,
        GATED | {"num_attention_heads": 8, "heads": "query", "pad_token_id": 2},
    ),
}
LLAMA_LIKE |= OTHERS | BY_QUERY
BLOOM = {
    "bloom": (BloomForCausalLM, BloomConfig, {"n_layer": LAYERS, "n_head": 4}),
    "bloom, 12 heads, residual after the norm": (
        BloomForCausalLM,
        BloomConfig,
        {"n_layer": LAYERS, "n_head": 12, "hidden_size": 48, "apply_residual_connection_post_layernorm": True},
    ),
}
TWELVE = {"num_attention_heads": 12, "num_key_value_heads": 12, "hidden_size": 48}
BAICHUAN = {"baichuan-13b, 12 heads": (SaapBaichuanForCausalLM, SaapBaichuanConfig, GATED | TWELVE)}
CASES = LLAMA_LIKE | BLOOM | BAICHUAN
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMAS = {
    "llama, no shared KV heads, biases": (LlamaForCausalLM, LlamaConfig, GATED | BIASES | {"num_key_value_heads": 4}),
    "llama, one KV head, tied": (
        LlamaForCausalLM,
        LlamaConfig,
        GATED | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


def build(case):
    model_class, config_class, fields = (CASES | LLAMAS)[case]
    torch.manual_seed(0)
    model = model_class(config_class(**(SMALL | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_keep(model, seed=0):
    """A different number of kept units, ≥ 1, in every layer and kind; some lower units go while higher ones stay."""
    rng = np.random.default_rng(seed)
    groups = discover(model)
    keep = np.zeros(len(groups), bool)
    for layer, kind, index in groups.structures():
        stretches = index.reshape(groups.stretches(layer, kind), -1)
        count = rng.integers(1, stretches.shape[1] + 1)
        for own in stretches:
            keep[rng.permutation(own)[:count]] = True
    return keep


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def assert_same_bits(again, model):
    """Also of what computes: a loaded file leaves tensors at odd addresses, where matrix products round differently."""
    again = copy.deepcopy(again)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    for parameter in again.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(again), logits(model))


def publish_baichuan(model, folder, **fields):
    """The weights of a model as a Baichuan's checkpoint in two shards, with code that must not run."""
    state = model.state_dict()
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.self_attn"
        stacked = torch.cat([state.pop(f"{path}.{letter}_proj.weight") for letter in "qkv"])
        state[f"{path}.W_pack.weight"] = stacked
        if "max_position_embeddings" in fields:
            state[f"{path}.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(state)
    for number, shard in enumerate((names[::2], names[1::2])):
        save_file({name: state[name].contiguous() for name in shard}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number in (0, 1) for name in names[number::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    names = ("hidden_act", "rms_norm_eps", "num_hidden_layers", "num_attention_heads", "intermediate_size", *SMALL)
    fields |= {name: getattr(model.config, name) for name in names} | {"model_type": "baichuan"}
    fields["auto_map"] = {"AutoConfig": "code.BaichuanConfig", "AutoModelForCausalLM": "code.BaichuanForCausalLM"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
