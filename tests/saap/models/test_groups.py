import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from saap import SaapError, discover, prune, select, weight_norms


def test_llama_7b_with_a_quarter_of_26_blocks_removed_has_the_size_llm_pruner_publishes():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    groups = discover(model)
    score = np.random.default_rng(0).random(len(groups))
    protect = (0, 1, 2, 3, 30, 31)
    keep = select(score, groups, 0.25 * 26 / 32, search="uniform", protect=protect, align=32)
    for layer in range(32):
        heads = keep[(groups.layer == layer) & (groups.kind == "attention")].sum()
        channels = keep[(groups.layer == layer) & (groups.kind == "mlp")].sum()
        assert (heads, channels) == ((32, 11008) if layer in protect else (24, 8256))
    assert sum(p.numel() for p in prune(model, keep).parameters()) == 5_422_977_024


def test_a_family_we_do_not_know_is_refused_by_name_with_the_known_ones():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    for ask in (discover, weight_norms):
        with pytest.raises(SaapError, match=r"'gpt2'.*known: .*\bllama\b"):
            ask(model)
