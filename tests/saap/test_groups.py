import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from saap import SaapError, discover, prune, select, weight_norms

D = 16


def slices(block, kind, unit, n_rep):
    """(weight slice, bias slice or None) of everything that goes with one unit."""
    a, m = block.self_attn, block.mlp
    query, key = slice(unit * n_rep * D, (unit + 1) * n_rep * D), slice(unit * D, (unit + 1) * D)
    if kind == "attention":
        into, out, columns = [(a.q_proj, query), (a.k_proj, key), (a.v_proj, key)], a.o_proj, query
    else:
        into, out, columns = [(m.gate_proj, [unit]), (m.up_proj, [unit])], m.down_proj, [unit]
    rows = [(w.weight[s], None if w.bias is None else w.bias[s]) for w, s in into]
    return [*rows, (out.weight[:, columns], None)]


def each_group(model, n_kv):
    for layer, block in enumerate(model.model.layers):
        for kind, units in (("attention", n_kv), ("mlp", 96)):
            for unit in range(units):
                yield layer, kind, unit, slices(block, kind, unit, 4 // n_kv)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_groups_come_by_layer_kind_and_unit_and_count_what_goes_with_them(tiny_llama, n_kv, bias):
    model = tiny_llama(n_kv, attention_bias=bias, mlp_bias=bias)
    groups = discover(model)
    expected = [
        (layer, kind, unit, sum(w.numel() + (0 if b is None else b.numel()) for w, b in parts))
        for layer, kind, unit, parts in each_group(model, n_kv)
    ]
    found = zip(groups.layer, groups.kind, groups.unit, groups.parameters, strict=True)
    assert [(int(a), str(b), int(c), int(d)) for a, b, c, d in found] == expected


@pytest.mark.parametrize("n_kv", [4, 2])
def test_weight_norms_are_the_sums_of_squares_of_each_group(tiny_llama, n_kv):
    model = tiny_llama(n_kv, attention_bias=True)
    expected = [sum(w.double().square().sum().item() for w, _ in parts) for *_, parts in each_group(model, n_kv)]
    norms = weight_norms(model)
    assert norms.dtype == np.float64
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


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
