import json
import struct

import numpy as np
import pytest
import torch

from saap import compare_speed, discover, prune, save, size_of, to_groupwise


def pruned(model):
    return prune(model, np.arange(len(discover(model))) % 3 != 1)


FORMS = {
    "dense": lambda model: model,
    "pruned": pruned,
    "int4": lambda model: to_groupwise(model, 32),
    "pruned int4, ragged": lambda model: to_groupwise(pruned(model), 20),
    "bfloat16": lambda model: model.bfloat16(),
}
SHAPES = {"plain": {}, "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True}}


def tensor_bytes(folder):
    """What the tensors of a safetensors file occupy, by its header."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for n, entry in header.items() if n[0] != "_")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_counted_logically_and_bytes_as_stored(tiny_llama, tmp_path, form, shape):
    model = tiny_llama(**SHAPES[shape])
    logical = (pruned(model) if "pruned" in form else model).parameters()
    expected = sum(p.numel() for p in logical)
    size = size_of(made := FORMS[form](model))
    save(made, tmp_path)
    assert size.parameters == expected
    assert size.weight_bytes == tensor_bytes(tmp_path)
    assert size.dtype == {"dense": "float32", "pruned": "float32", "bfloat16": "bfloat16"}.get(form, "int4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["dense", "pruned", "pruned int4, ragged"])
def test_macs_are_the_linear_layers_the_head_and_attention_over_the_context(tiny_llama, form, shape):
    model = tiny_llama(**SHAPES[shape])
    widths = pruned(model) if "pruned" in form else model
    linear, per_position = 512 * 64, 0
    for module in widths.model.layers:
        a, m = module.self_attn, module.mlp
        for layer in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj):
            linear += layer.in_features * layer.out_features
        per_position += 2 * a.q_proj.out_features  # one product for the scores, one for the values
    size = size_of(FORMS[form](model))
    assert [size.macs_per_token(context) for context in (0, 1, 100)] == [
        linear,
        linear + per_position,
        linear + 100 * per_position,
    ]


def test_every_variant_has_a_row_and_the_first_is_what_the_ratios_compare_with(tiny_llama):
    model = tiny_llama()
    models = {"dense": model, "pruned": pruned(model), "recovered": to_groupwise(pruned(model), 32)}
    sizes = {name: size_of(m) for name, m in models.items()}
    rows = compare_speed(models, sizes, prompt_tokens=6, new_tokens=3, runs=3, warmup=1, batch_size=2)
    assert [row.variant for row in rows] == list(models)
    assert (rows[0].decode_ratio, rows[0].prefill_ratio) == (1, 1)
    for row in rows:
        size = sizes[row.variant]
        assert (row.parameters, row.weight_bytes, row.dtype) == (size.parameters, size.weight_bytes, size.dtype)
        assert row.macs_per_token == size.macs_per_token(6)
        assert (row.prompt_tokens, row.new_tokens, row.runs, row.threads) == (6, 3, 3, torch.get_num_threads())
        assert (row.batch_size, row.eager_tokens_per_s) == (2, row.tokens_per_s)
        rates = (row.tokens_per_s, row.prefill_tokens_per_s, row.decode_ratio, row.prefill_ratio)
        assert min(rates) > 0
        assert np.isfinite(rates).all()
        assert row.tokens_per_s_spread >= 0
