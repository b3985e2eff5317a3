import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from saap import SaapError, discover, mask, prune, widths
from tests.saap.models.families import random_keep

D = 16
SHAPES = [
    pytest.param(4, {}, id="mha"),
    pytest.param(2, {}, id="gqa"),
    pytest.param(1, {"tie_word_embeddings": True}, id="one KV head, tied"),
    pytest.param(2, {"attention_bias": True, "mlp_bias": True}, id="gqa with biases"),
    pytest.param(4, {"attention_bias": True, "tie_word_embeddings": True}, id="mha with biases, tied"),
]


def kept_units(groups, keep, layer, kind):
    return groups.unit[keep & (groups.layer == layer) & (groups.kind == kind)].tolist()


@pytest.mark.parametrize(("n_kv", "config"), SHAPES)
def test_widths_and_parameter_counts_are_those_of_the_plan(tiny_llama, n_kv, config):
    model = tiny_llama(n_kv, **config)
    groups = discover(model)
    keep = random_keep(model)
    small = prune(model, keep)
    for layer, module in enumerate(small.model.layers):
        heads, channels = (len(kept_units(groups, keep, layer, kind)) for kind in ("attention", "mlp"))
        attention, mlp = module.self_attn, module.mlp
        # with one KV head a group is a query head, and k and v stay
        queries, shared = (heads, 1) if n_kv == 1 else (heads * 4 // n_kv, heads)
        wide = queries * D
        outputs = [m.out_features for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert outputs == [wide, shared * D, shared * D]
        assert [m.out_features for m in (mlp.gate_proj, mlp.up_proj)] == [channels, channels]
        assert (attention.o_proj.in_features, mlp.down_proj.in_features) == (wide, channels)
        expected = {"num_attention_heads": queries, "num_key_value_heads": shared, "intermediate_size": channels}
        found = widths(model, groups, keep)[layer]
        assert found == {name: expected[name] for name in found}
        assert found.keys() == expected.keys() - ({"num_key_value_heads"} if n_kv == 1 else set())
    dense = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == dense - groups.parameters[~keep].sum()
    assert discover(small).parameters.sum() == groups.parameters[keep].sum()


def test_pruning_keeps_the_dtype(tiny_llama):
    model = tiny_llama().bfloat16()
    keep = random_keep(model)
    assert {p.dtype for p in prune(model, keep).parameters()} == {torch.bfloat16}


def test_the_pruned_model_shares_nothing_with_the_original(tiny_llama):
    model = tiny_llama()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    small = prune(model, random_keep(model))
    masked = mask(model, random_keep(model))
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


def test_a_model_whose_weights_are_elsewhere_is_refused(tiny_llama):
    model = tiny_llama()
    keep = random_keep(model)
    with pytest.raises(SaapError, match="all on its device"):
        prune(cpu_offload(model, execution_device="cpu"), keep)
