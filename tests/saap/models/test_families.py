"""Every family the same way, against slices, autograd and masks."""

import copy

import numpy as np
import pytest
import torch

from saap import discover, mask, prune, score, select
from saap import weight_norms as norms_of
from tests.saap.models.families import CASES, IDS, LLAMAS, OTHERS, assert_same_bits, build, logits, random_keep
from tests.saap.models.layouts import each_group, silenced, take


def test_groups_and_their_sizes_are_the_slices_that_go_together(model):
    expected = []
    for layer, kind, unit, parts in each_group(model):
        size = sum(take(linear.weight, axis, piece).numel() for linear, axis, piece in parts)
        size += sum(linear.bias[p].numel() for linear, axis, p in parts if axis == 0 and linear.bias is not None)
        if kind == "attention" and "olmo" in model.config.model_type:  # its norms of q and k run over all heads
            size += sum(take(m.weight, axis, p).shape[0] for m, axis, p in parts[:2] if axis == 0)
        expected.append((layer, kind, unit, size))
    groups = discover(model)
    found = zip(groups.layer, groups.kind, groups.unit, groups.parameters, strict=True)
    assert [(int(a), str(b), int(c), int(d)) for a, b, c, d in found] == expected


def test_weight_norms_are_the_sums_of_squares_of_each_group(model):
    expected = [
        sum(take(linear.weight, axis, piece).double().square().sum().item() for linear, axis, piece in parts)
        for *_, parts in each_group(model)
    ]
    assert norms_of(model).dtype == np.float64
    np.testing.assert_allclose(norms_of(model), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", ["dense", "pruned"])
def test_scores_equal_plain_autograd_at_batch_1(model, shape):
    if shape == "pruned":
        model = prune(model, random_keep(model))
    exact = copy.deepcopy(model).double()
    vectors, elements = [], []
    for ids in IDS[:, None]:
        exact.zero_grad()
        exact(ids, labels=ids).loss.backward()
        vector, element = [], []
        for *_, parts in each_group(exact):
            coarse = fine = 0.0
            for linear, axis, piece in parts:
                s = take(linear.weight * linear.weight.grad, axis, piece).detach()
                coarse += s.sum(1 - axis).abs().sum().item()
                fine += (s - 0.5 * s.square()).abs().sum().item()
            vector.append(coarse)
            element.append(fine)
        vectors.append(vector)
        elements.append(element)
    plain_vector, plain_element = np.array(vectors), np.array(elements)
    for batch_size in (1, 2):
        vector, element = score(model, IDS, batch_size=batch_size)
        np.testing.assert_allclose(element, plain_element, rtol=1e-4)
        # where the vector score's |Σ s| cancels, float32 leaves some of the Σ |s| it cancelled from
        assert (np.abs(vector - plain_vector) <= 1e-4 * plain_vector + 1e-5 * plain_element).all()


@pytest.mark.parametrize(
    ("case", "seed"), [(case, seed) for case in CASES | LLAMAS for seed in range(1 if case in OTHERS else 3)]
)
def test_pruned_logits_equal_those_of_the_masked_dense_model(case, seed):
    model = build(case)
    keep = random_keep(model, seed)
    oracle = logits(silenced(model, keep))
    small = prune(model, keep)
    torch.testing.assert_close(logits(small), oracle, rtol=1e-5, atol=1e-5)
    if "olmo" in model.config.model_type:  # whose weights make up for the count of heads
        torch.testing.assert_close(logits(mask(model, keep)), oracle, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(mask(model, keep)), oracle)
    assert (oracle - logits(model)).abs().max() > 0.01
    removed = discover(model).parameters[~keep].sum()
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - removed
    assert discover(small).parameters.sum() == discover(model).parameters[keep].sum()


def test_a_plan_of_select_can_be_applied(model):
    groups = discover(model)
    keep = select(np.random.default_rng(0).random(len(groups)), groups, 0.3, protect=(0,), align=8)
    torch.testing.assert_close(logits(prune(model, keep)), logits(silenced(model, keep)), rtol=1e-5, atol=1e-5)


def test_pruning_twice_equals_pruning_once(model):
    first = random_keep(model, 1)
    once = prune(model, first)
    second = random_keep(once, 2)
    both = first.copy()
    both[first] = second
    twice, direct = prune(once, second), prune(model, both)
    assert_same_bits(twice, direct)
    assert twice.config.to_dict() == direct.config.to_dict()
