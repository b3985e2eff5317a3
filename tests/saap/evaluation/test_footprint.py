"""Sizes told from shapes alone, against those of models that are really made."""

import copy

import pytest
import torch
from torch import nn

from saap import Footprint, discover, family_of, prune, size_of, to_groupwise
from tests.saap.models import mixtures
from tests.saap.models.families import CASES, LLAMAS, build, random_keep


def meta(model):
    empty = copy.deepcopy(model).to("meta")
    empty.tie_weights()
    return empty


def test_the_attention_of_a_hybrid_is_counted_though_no_group_holds_it():
    """Two of the four layers attend, with 4 heads of 16."""
    assert size_of(build("qwen3_5")).attention_width == 2 * 4 * 16


@pytest.mark.parametrize("case", CASES | LLAMAS)
def test_parameters_and_bytes_are_those_of_the_pruned_model(case):
    model = build(case)
    groups, keep = discover(model), random_keep(model)
    for dtype in ("float32", "bfloat16"):
        small = size_of(prune(model, keep).to(getattr(torch, dtype)))
        told = Footprint(meta(model), groups, dtype)
        assert (told.parameters(keep), told.weight_bytes(keep)) == (small.parameters, small.weight_bytes)


@pytest.mark.parametrize("case", mixtures.CASES)
def test_so_they_are_where_experts_go(case):
    model = mixtures.build(case)
    groups, keep = discover(model), mixtures.random_keep(model)
    small, told = size_of(prune(model, keep)), Footprint(meta(model), groups)
    assert (told.parameters(keep), told.weight_bytes(keep)) == (small.parameters, small.weight_bytes)


@pytest.mark.parametrize(
    "form",
    [{"bits": 4, "group_size": 32}, {"bits": 3, "group_size": 16}, {"bits": 5, "groups": 3}, {"bits": 2, "groups": 50}],
    ids=str,
)
@pytest.mark.parametrize("case", [case for case in CASES | LLAMAS if "bloom" not in case])
def test_bytes_in_codes_are_those_of_the_recovered_model(case, form):
    model = build(case)
    if not family_of(model.config).int4:
        pytest.skip("has no int4 form")
    groups, keep = discover(model), random_keep(model)
    options = {"group_size": None} | form
    size = options.pop("group_size")
    for dtype in ("float32", "float16"):
        small = to_groupwise(prune(model, keep).to(getattr(torch, dtype)), size, **options)
        told = Footprint(meta(model), groups, dtype, groupwise=form)
        assert told.parameters(keep) == size_of(small).parameters
        assert told.weight_bytes(keep) == size_of(small).weight_bytes


@pytest.mark.parametrize("case", ["llama", "llama, no shared KV heads, biases"])
def test_the_biases_that_make_up_for_what_goes_are_counted_where_there_were_none(case):
    model = build(case)
    groups, keep = discover(model), random_keep(model)
    small = prune(model, keep)
    for layer in small.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    told = Footprint(meta(model), groups, output_bias=True)
    assert (told.parameters(keep), told.weight_bytes(keep)) == (size_of(small).parameters, size_of(small).weight_bytes)
