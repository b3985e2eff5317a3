"""Pruned models of every family: saved, generating, padded, measured and in int4."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from saap import GroupwiseLinear, load, prune, quantize, save, size_of, to_groupwise
from tests.saap.models.families import (
    GREEDY,
    IDS,
    LLAMA_LIKE,
    OTHERS,
    SMALL,
    assert_same_bits,
    build,
    logits,
    random_keep,
)
from tests.saap.models.layouts import each_group, layers, take


@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained], ids=["saap", "transformers"])
def test_a_saved_pruned_model_loads_bit_for_bit_and_keeps_its_configuration(model, tmp_path, reader):
    small = prune(model, random_keep(model))
    save(small, tmp_path)
    again = reader(tmp_path)
    assert type(again) is type(small)
    assert_same_bits(again, small)
    for name in ("sliding_window", "layer_types", "rope_parameters", "tie_word_embeddings"):
        assert getattr(again.config, name, None) == getattr(model.config, name, None)


def test_generation_with_a_cache_equals_generation_without(model):
    small = prune(model, random_keep(model))
    cached = small.generate(IDS, use_cache=True, **GREEDY)
    assert torch.equal(cached, small.generate(IDS, use_cache=False, **GREEDY))
    ids = IDS
    for _ in range(12):
        scores = logits(small, ids)[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)


def test_the_attention_implementation_can_be_changed_after_loading(llama_like, tmp_path):
    small = prune(llama_like, random_keep(llama_like))
    save(small, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for implementation in ("eager", "sdpa") if again._supports_sdpa else ("eager",):
        again.set_attn_implementation(implementation)
        attention = [b.self_attn for b in layers(again) if hasattr(b, "self_attn")]
        assert {layer.config._attn_implementation for layer in attention} == {implementation}
        torch.testing.assert_close(logits(again), logits(small), rtol=1e-5, atol=1e-5)


def test_a_left_padded_batch_equals_its_rows_alone(model):
    small, pad = prune(model, random_keep(model)), 4
    ids, seen = IDS.clone(), torch.ones_like(IDS)
    ids[1, :pad], seen[1, :pad] = 2, 0
    together = logits(small, ids, attention_mask=seen)
    torch.testing.assert_close(together[:1], logits(small, ids[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:2, pad:], logits(small, ids[1:2, pad:]), rtol=1e-4, atol=1e-5)
    generated = small.generate(ids, attention_mask=seen, **GREEDY)
    assert torch.equal(generated, small.generate(ids, attention_mask=seen, use_cache=False, **GREEDY))
    assert torch.equal(generated[1:2, pad:], small.generate(ids[1:2, pad:], **GREEDY))


def expected_sizes(model):
    """Parameters, and the multiply-accumulates of one token over 100 positions."""
    macs = SMALL["vocab_size"] * model.config.hidden_size
    for layer in layers(model):
        macs += sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
    width = 0
    for _, kind, _, parts in each_group(model):
        if kind == "attention":
            width += sum(take(m.weight, 1, piece).shape[1] for m, axis, piece in parts if axis == 1)
    if model.config.model_type.endswith("qwen3_5_text"):  # its attention is in no group
        width = sum(layer.self_attn.o_proj.in_features for layer in layers(model) if hasattr(layer, "self_attn"))
    macs += 2 * 100 * width
    return sum(p.numel() for p in model.parameters()), macs


def test_sizes_are_those_of_the_linear_layers_and_the_cache(model):
    for shape in (model, prune(model, random_keep(model))):
        assert (size_of(shape).parameters, size_of(shape).macs_per_token(100)) == expected_sizes(shape)


def test_an_int4_model_has_the_sizes_of_the_float_one(llama_like):
    small = prune(llama_like, random_keep(llama_like))
    size = size_of(to_groupwise(small, 32))
    assert (size.parameters, size.macs_per_token(100), size.dtype) == (*expected_sizes(small), "int4")


@pytest.mark.parametrize(
    ("case", "shape", "group_size"),
    [(case, "pruned", 32) for case in LLAMA_LIKE]
    + [(case, "dense", 32) for case in LLAMA_LIKE if case not in OTHERS]
    + [(case, "pruned", 20) for case in LLAMA_LIKE if case not in OTHERS],
)
def test_int4_models_compute_with_their_codes_and_load_bit_for_bit(case, shape, group_size, tmp_path):
    llama_like = build(case)
    model = llama_like if shape == "dense" else prune(llama_like, random_keep(llama_like))
    linears = sum(isinstance(m, nn.Linear) for layer in layers(model) for m in layer.modules())
    small = to_groupwise(model, group_size)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for linear in (m for layer in layers(oracle) for m in layer.modules() if isinstance(m, nn.Linear)):
            codes, scale, zero = quantize(linear.weight, group_size)
            group = torch.arange(codes.shape[1]) // group_size
            linear.weight.copy_(codes.float() * scale.float()[:, group] + zero.float()[:, group])
    torch.testing.assert_close(logits(small), logits(oracle), rtol=1e-5, atol=1e-5)
    assert not any(type(m) is nn.Linear for layer in layers(small) for m in layer.modules())
    save(small, tmp_path)
    for again in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert sum(isinstance(m, GroupwiseLinear) for m in again.modules()) == linears
        assert_same_bits(again, small)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(IDS, use_cache=True, **GREEDY), small.generate(IDS, use_cache=False, **GREEDY))
