"""Uniform exports: read by transformers' own classes, with the outputs of the uneven model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from saap import SaapError, dequantize, discover, load, prune, save, select, to_groupwise
from saap.export.uniform import export_uniform
from tests.saap.export.gguf_files import with_output_biases
from tests.saap.models.families import GATED, GREEDY, IDS, LLAMA_LIKE, SMALL, build, logits, random_keep


def stock(model, tokenizer, folder, **settings):
    """(what the export says, the model as plain transformers reads it)."""
    save(model, folder / "uneven", tokenizer)
    done = export_uniform(folder / "uneven", folder / "even", **settings)
    again = AutoModelForCausalLM.from_pretrained(folder / "even")
    config = json.loads((folder / "even" / "config.json").read_text())
    assert type(again).__module__.startswith("transformers.models.")
    assert not {"auto_map", "per_layer_config", "groupwise", "output_bias"} & config.keys()
    assert not list((folder / "even").glob("*.py"))
    assert (folder / "even" / "tokenizer.json").exists()
    return done, again


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("case", LLAMA_LIKE)
def test_plain_transformers_gives_the_outputs_of_the_uneven_model(case, round_to, tiny_tokenizer, tmp_path):
    small = prune(build(case), random_keep(build(case), seed=3))
    done, even = stock(small, tiny_tokenizer, tmp_path, round_to=round_to)
    torch.testing.assert_close(logits(even), logits(small), rtol=1e-4, atol=1e-5)
    assert torch.equal(even.generate(IDS, **GREEDY), small.generate(IDS, **GREEDY))
    assert done["num_attention_heads"] % round_to == done["intermediate_size"] % round_to == 0
    assert round_to % done["num_key_value_heads"] == 0 or done["num_key_value_heads"] % round_to == 0


@pytest.mark.parametrize("round_to", [1, 2, 3, 8])
def test_heads_that_do_not_divide_the_hidden_size_are_accepted(round_to, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    fields = SMALL | GATED | {"num_attention_heads": 8, "num_key_value_heads": 8}
    dense = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    groups = discover(dense)
    keep = select(np.random.default_rng(0).random(len(groups)), groups, 0.4, search="uniform", protect=(), align=8)
    small = prune(dense, keep)
    assert {c.num_attention_heads for c in small.config.per_layer_config} == {5}
    done, even = stock(small, tiny_tokenizer, tmp_path, round_to=round_to)
    assert done["num_attention_heads"] == {1: 5, 2: 6, 3: 6, 8: 8}[round_to]
    torch.testing.assert_close(logits(even), logits(small), rtol=1e-4, atol=1e-5)
    if round_to == 1:  # equal layers already: nothing is filled up
        assert sum(p.numel() for p in even.parameters()) == sum(p.numel() for p in small.parameters())


def test_int4_becomes_floats_of_the_same_values(tiny_tokenizer, tmp_path):
    small = to_groupwise(prune(build("llama"), random_keep(build("llama"))), 32)
    _, even = stock(small, tiny_tokenizer, tmp_path)
    torch.testing.assert_close(logits(even), logits(dequantize(small)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2"])
def test_biases_of_compensated_pruning_find_a_class_that_has_them(case, tiny_tokenizer, tmp_path):
    small = with_output_biases(prune(build(case), random_keep(build(case))))
    done, even = stock(small, tiny_tokenizer, tmp_path)
    assert done["class"] == "LlamaForCausalLM"
    torch.testing.assert_close(logits(even), logits(small), rtol=1e-4, atol=1e-5)


def test_the_stored_dtype_is_kept(tiny_tokenizer, tmp_path):
    small = prune(build("llama"), random_keep(build("llama"))).bfloat16()
    small.config.dtype = torch.bfloat16
    _, even = stock(small, tiny_tokenizer, tmp_path)
    assert {p.dtype for p in even.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "even", dtype="bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("case", "bias", "message"),
    [
        ("bloom", False, "bloom"),
        ("qwen3", True, "down_proj"),
        ("mistral, sliding window, one KV head", True, "o_proj"),
    ],
)
def test_what_no_stock_class_has_is_refused(case, bias, message, tiny_tokenizer, tmp_path):
    small = prune(build(case), random_keep(build(case)))
    save(with_output_biases(small) if bias else small, tmp_path / "uneven", tiny_tokenizer)
    with pytest.raises(SaapError, match=message):
        export_uniform(tmp_path / "uneven", tmp_path / "even")
    assert not (tmp_path / "even").exists()
