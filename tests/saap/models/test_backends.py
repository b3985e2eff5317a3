"""What a serving engine asks of a checkpoint that computes attention itself, as vLLM's Transformers backend does."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from saap import prune, save
from tests.saap.models.families import IDS, LAYERS, build, random_keep
from tests.saap.models.mixtures import build as mixture
from tests.saap.models.mixtures import random_keep as some_kept

CASES = [
    "llama",
    "qwen2, layer types",
    "qwen3",
    "gemma3",
    "granite",
    "phi3",
    "olmo2",
    "cohere2",
    "llama, by query heads",
]


@pytest.mark.parametrize("case", [*CASES, "qwen3_moe", "gpt_oss"])
def test_an_attention_from_elsewhere_is_that_of_every_layer_with_its_own_heads(case, tmp_path):
    """The engine names its attention in the config, makes the model without a head, and then fills in the weights."""
    mixed = case in ("qwen3_moe", "gpt_oss")
    model, keep = (mixture, some_kept) if mixed else (build, random_keep)
    small = prune(model(case), keep(model(case)))
    save(small, tmp_path)
    seen = []

    def theirs(module, query, key, *args, **kwargs):
        seen.append((module.layer_idx, query.shape[1], key.shape[1]))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("theirs", theirs)
    AttentionMaskInterface.register("theirs", sdpa_mask)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "theirs"
    base = AutoModel.from_config(config).eval()
    state = {
        name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if "lm_head" not in name
    }
    base.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    small.set_attn_implementation("sdpa" if case != "gpt_oss" else "eager")
    with torch.no_grad():
        found, expected = base(IDS).last_hidden_state, small.base_model(IDS).last_hidden_state
    layers = small.config.per_layer_config
    assert seen == [(i, layers[i].num_attention_heads, layers[i].num_key_value_heads) for i in range(LAYERS)]
    if case != "gpt_oss":  # whose sinks torch's attention does not have
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
