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
from tests.saap.models.mixtures import CASES as MIXTURES
from tests.saap.models.mixtures import build as mixture
from tests.saap.models.mixtures import random_keep as some_kept


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


def even_numbers(model, equal):
    """Random groups to keep; with equal, two experts of every layer that has some."""
    groups, keep = discover(model), some_kept(model, 3)
    for experts, channels in groups.mixtures().values() if equal else ():
        keep[experts] = [True, False, True, False]
        keep[channels] = keep[channels][keep[channels].any(1)][0] & keep[experts][:, None]
    return keep


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_becomes_a_stock_one(case, round_to, tiny_tokenizer, tmp_path):
    model = mixture(case)
    small = prune(model, even_numbers(model, equal=case != "gpt_oss"))
    done, even = stock(small, tiny_tokenizer, tmp_path, round_to=round_to)
    torch.testing.assert_close(logits(even), logits(small), rtol=1e-4, atol=1e-5)
    assert torch.equal(even.generate(IDS, **GREEDY), small.generate(IDS, **GREEDY))
    width = "moe_intermediate_size" if "qwen" in case else "intermediate_size"
    assert done[width] % round_to == done["num_attention_heads"] % round_to == 0


def test_experts_that_differ_in_number_need_a_router_with_biases(tiny_tokenizer, tmp_path):
    model = mixture("mixtral")
    keep = np.ones(len(discover(model)), bool)
    (experts, channels), *_ = discover(model).mixtures().values()
    keep[experts[1]], keep[channels[1]] = False, False
    small = prune(model, keep)
    with pytest.raises(SaapError, match=r"3 to 4 experts.*uniform"):
        stock(small, tiny_tokenizer, tmp_path)
