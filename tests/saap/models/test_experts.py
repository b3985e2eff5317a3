"""Mixtures of experts: whole experts, channels inside them and heads, counted, pruned, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from saap import SaapError, discover, load, prune, save, size_of, taylor_sums, to_groupwise
from tests.saap.models.families import GREEDY, IDS, assert_same_bits, logits
from tests.saap.models.mixtures import (
    CASES,
    WIDTH,
    E,
    build,
    mixed,
    random_keep,
    router_and_experts,
    silenced,
)


@pytest.fixture(params=CASES)
def model(request):
    return build(request.param)


def test_a_group_is_a_head_an_expert_or_a_channel_of_one_and_they_add_up(model):
    groups = discover(model)
    for number, layer in enumerate(model.model.layers):
        here = groups.layer == number
        counts = [int((here & (groups.kind == kind)).sum()) for kind in ("attention", "expert", "mlp")]
        inner = groups.parameters[here & (groups.kind != "attention")].sum()
        if not mixed(layer):
            assert counts == [2, 0, 96]
            assert inner == sum(p.numel() for p in layer.mlp.parameters())
            continue
        assert counts == [2, E, E * WIDTH]
        held = sum(p.numel() for module in router_and_experts(layer) for p in module.parameters())
        assert inner == held
        assert groups.costs[here & (groups.kind == "expert")].sum() == held


@pytest.mark.parametrize("seed", range(3))
def test_pruned_logits_equal_those_of_a_router_that_never_picks_what_is_gone(model, seed):
    keep = random_keep(model, seed)
    small, oracle = prune(model, keep), logits(silenced(model, keep))
    torch.testing.assert_close(logits(small), oracle, rtol=1e-4, atol=1e-5)
    assert (oracle - logits(model)).abs().max() > 0.01
    gone = discover(model).parameters[~keep].sum()
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - gone
    assert discover(small).parameters.sum() == discover(model).parameters[keep].sum()


@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained], ids=["saap", "transformers"])
def test_a_pruned_mixture_loads_bit_for_bit_and_generates_with_a_cache(model, tmp_path, reader):
    small = prune(model, random_keep(model))
    save(small, tmp_path)
    again = reader(tmp_path)
    assert type(again) is type(small)
    assert_same_bits(again, small)
    assert torch.equal(again.generate(IDS, use_cache=True, **GREEDY), small.generate(IDS, use_cache=False, **GREEDY))


def test_experts_are_computed_as_the_dense_ones_where_their_width_allows_it(model):
    groups, keep = discover(model), np.ones(len(discover(model)), bool)
    (_, whole), *_, (_, odd) = groups.mixtures().values()
    keep[whole[:, 8:]], keep[odd[:, 5:]] = False, False
    small = prune(model, keep)
    _, first = router_and_experts(small.model.layers[min(groups.mixtures())])
    _, last = router_and_experts(small.model.layers[max(groups.mixtures())])
    assert model.config._experts_implementation == "grouped_mm"
    oracle = logits(silenced(model, keep))
    for implementation, in_odd in ((None, "eager"), ("eager", "eager"), ("batched_mm", "batched_mm")):
        if implementation:
            small.set_experts_implementation(implementation)
        assert first.config._experts_implementation == (implementation or "grouped_mm")
        assert last.config._experts_implementation == in_odd
        torch.testing.assert_close(logits(small), oracle, rtol=1e-4, atol=1e-5)


def test_a_dense_mixture_as_the_hub_has_it_is_read_and_a_part_of_an_expert_missed(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    assert_same_bits(load(tmp_path), model)
    if model.config.model_type == "gpt_oss":  # its experts are stored as they are computed
        assert "model.layers.3.mlp.experts.down_proj" in stored
        return
    one = next(name for name in stored if ".experts.2." in name)
    save_file({name: tensor for name, tensor in stored.items() if name != one}, file, metadata={"format": "pt"})
    with pytest.raises(SaapError, match="do not fit"):
        load(tmp_path)


def test_active_parameters_are_those_of_the_experts_a_router_picks(model):
    small = prune(model, random_keep(model))
    size, idle = size_of(small), 0
    macs = 512 * 64 + sum(m.weight.numel() for m in small.model.layers.modules() if isinstance(m, nn.Linear))
    for layer in filter(mixed, small.model.layers):
        router, experts = router_and_experts(layer)
        held = sum(p.numel() for p in experts.parameters())
        idle += held * (experts.num_experts - 2) // experts.num_experts
        matrices = experts.gate_up_proj.numel() + experts.down_proj.numel()
        macs += router.weight.numel() + matrices * 2 // experts.num_experts
    assert size.parameters == sum(p.numel() for p in small.parameters())
    assert size.active == size.parameters - idle
    assert size.macs_per_token(0) == macs


def test_what_cannot_be_is_refused_by_name(model):
    groups = discover(model)
    keep = np.ones(len(groups), bool)
    keep[np.flatnonzero(groups.kind == "expert")[: E - 1]] = False
    with pytest.raises(SaapError, match="1 experts, its router picks 2"):
        prune(model, keep)
    keep = np.ones(len(groups), bool)
    keep[np.flatnonzero(groups.kind == "expert")[0]] = False
    with pytest.raises(SaapError, match=r"channels of experts of layer \d that go"):
        prune(model, keep)
    with pytest.raises(SaapError, match="experts of a"):
        taylor_sums(model, IDS)
    with pytest.raises(SaapError, match="group-wise int4 is not available"):
        to_groupwise(model, 32)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_mixture_that_asks_for_router_logits_is_pruned_to_one_that_does_not(case, tmp_path):
    """Their loss, which balances experts, takes one number of experts for all layers."""
    model = build(case)
    keep = random_keep(model)
    wanted = logits(prune(model, keep))
    model.config.output_router_logits = True
    save(prune(model, keep), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not fields["output_router_logits"]
    (tmp_path / "config.json").write_text(json.dumps(fields | {"output_router_logits": True}))
    for small in (prune(model, keep), load(tmp_path)):
        torch.testing.assert_close(logits(small), wanted)
    assert model.config.output_router_logits
