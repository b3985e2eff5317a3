import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from saap import SaapError, discover, load, mask, prune, save, widths

D = 16
IDS = torch.randint(3, 512, (2, 11), generator=torch.Generator().manual_seed(2))
SHAPES = [
    pytest.param(4, {}, id="mha"),
    pytest.param(2, {}, id="gqa"),
    pytest.param(1, {"tie_word_embeddings": True}, id="one KV head, tied"),
    pytest.param(2, {"attention_bias": True, "mlp_bias": True}, id="gqa with biases"),
    pytest.param(4, {"attention_bias": True, "tie_word_embeddings": True}, id="mha with biases, tied"),
]


def random_keep(groups, seed=0):
    """A different number of kept units, ≥ 1, in every block and kind."""
    rng = np.random.default_rng(seed)
    keep = np.zeros(len(groups), bool)
    for layer in range(groups.layer.max() + 1):
        for kind in ("attention", "mlp"):
            index = np.flatnonzero((groups.layer == layer) & (groups.kind == kind))
            keep[rng.permutation(index)[: rng.integers(1, len(index) + 1)]] = True
    return keep


def kept_units(groups, keep, layer, kind):
    return groups.unit[keep & (groups.layer == layer) & (groups.kind == kind)].tolist()


@torch.no_grad()
def silenced(model, keep):
    """The dense model, its removed heads and channels writing nothing."""
    model, groups = copy.deepcopy(model), discover(model)
    n_rep = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, kind, unit, kept in zip(groups.layer, groups.kind, groups.unit, keep, strict=True):
        block = model.model.layers[layer]
        if not kept and kind == "attention":
            block.self_attn.o_proj.weight[:, unit * n_rep * D : (unit + 1) * n_rep * D] = 0
        elif not kept:
            block.mlp.down_proj.weight[:, unit] = 0
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.fixture
def pruned(tiny_llama):
    model = tiny_llama()
    return prune(model, random_keep(discover(model)))


@pytest.mark.parametrize(("n_kv", "config"), SHAPES)
def test_pruned_logits_equal_those_of_the_masked_dense_model(tiny_llama, n_kv, config):
    model = tiny_llama(n_kv, **config)
    for seed in range(3):
        keep = random_keep(discover(model), seed)
        oracle = logits(silenced(model, keep))
        torch.testing.assert_close(logits(prune(model, keep)), oracle, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(mask(model, keep)), oracle)
        assert (oracle - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize(("n_kv", "config"), SHAPES)
def test_widths_and_parameter_counts_are_those_of_the_plan(tiny_llama, n_kv, config):
    model = tiny_llama(n_kv, **config)
    groups = discover(model)
    keep = random_keep(groups)
    small = prune(model, keep)
    for layer, block in enumerate(small.model.layers):
        heads, channels = (len(kept_units(groups, keep, layer, kind)) for kind in ("attention", "mlp"))
        attention, mlp = block.self_attn, block.mlp
        wide = heads * D * 4 // n_kv
        assert [m.out_features for m in (attention.q_proj, attention.k_proj, attention.v_proj)] == [
            wide,
            heads * D,
            heads * D,
        ]
        assert [m.out_features for m in (mlp.gate_proj, mlp.up_proj)] == [channels, channels]
        assert (attention.o_proj.in_features, mlp.down_proj.in_features) == (wide, channels)
        assert widths(model, groups, keep)[layer] == {
            "num_attention_heads": heads * 4 // n_kv,
            "num_key_value_heads": heads,
            "intermediate_size": channels,
        }
    dense = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == dense - groups.parameters[~keep].sum()
    assert discover(small).parameters.sum() == groups.parameters[keep].sum()


def test_pruning_twice_equals_pruning_once(tiny_llama):
    model = tiny_llama()
    first = random_keep(discover(model), 1)
    once = prune(model, first)
    second = random_keep(discover(once), 2)
    both = first.copy()
    both[first] = second
    twice, direct = prune(once, second).state_dict(), prune(model, both).state_dict()
    assert twice.keys() == direct.keys()
    assert all(torch.equal(twice[name], tensor) for name, tensor in direct.items())


@pytest.mark.parametrize(("n_kv", "config"), SHAPES)
@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained], ids=["saap", "transformers"])
def test_a_saved_pruned_model_loads_bit_for_bit(tiny_llama, tmp_path, reader, n_kv, config):
    model = tiny_llama(n_kv, **config)
    small = prune(model, random_keep(discover(model)))
    save(small, tmp_path)
    again, state = reader(tmp_path), small.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(logits(again), logits(small))


def test_pruning_keeps_the_dtype(tiny_llama):
    model = tiny_llama().bfloat16()
    keep = random_keep(discover(model))
    assert {p.dtype for p in prune(model, keep).parameters()} == {torch.bfloat16}


def test_generation_with_a_cache_equals_generation_without(pruned):
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 2}
    cached = pruned.generate(IDS, use_cache=True, **settings)
    assert cached.shape == (2, 31)
    assert torch.equal(cached, pruned.generate(IDS, use_cache=False, **settings))
    ids = IDS
    for _ in range(20):
        scores = logits(pruned, ids)[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)


def test_a_left_padded_batch_equals_its_rows_alone(pruned):
    pad = 4
    ids = IDS.clone()
    ids[1, :pad] = 2
    seen = torch.ones_like(ids)
    seen[1, :pad] = 0
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad():
        together = pruned(ids, attention_mask=seen).logits
    torch.testing.assert_close(together[:1], logits(pruned, ids[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:, pad:], logits(pruned, ids[1:, pad:]), rtol=1e-4, atol=1e-5)
    generated = pruned.generate(ids, attention_mask=seen, **settings)
    alone = pruned.generate(ids[1:, pad:], **settings)
    assert torch.equal(generated[1:, pad:], alone)


def test_the_pruned_model_shares_nothing_with_the_original(tiny_llama):
    model = tiny_llama()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    small = prune(model, random_keep(discover(model)))
    masked = mask(model, random_keep(discover(model)))
    with torch.no_grad():
        for tensor in (*small.state_dict().values(), *masked.state_dict().values()):
            tensor.zero_()
    small.generation_config.max_new_tokens = 77
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.generation_config.max_new_tokens != 77


@pytest.mark.parametrize("cut", [prune, mask])
@pytest.mark.parametrize(
    "spoil",
    [lambda keep: keep[:-1], lambda keep: keep[None], lambda keep: keep.astype(int)],
    ids=["too short", "two axes", "integers"],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(tiny_llama, cut, spoil):
    model = tiny_llama()
    with pytest.raises(SaapError, match="keep must be bool"):
        cut(model, spoil(np.ones(len(discover(model)), bool)))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_plan_that_empties_a_block_is_refused_by_name(tiny_llama, kind):
    model = tiny_llama()
    groups = discover(model)
    with pytest.raises(SaapError, match=f"layer 4 .*{kind}"):
        prune(model, ~((groups.layer == 4) & (groups.kind == kind)))
