"""The masks' Fisher information against autograd on masks that are really there."""

import copy
import importlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saap import CRITERIA, SaapError, discover, mask_fisher, prune, refit, select
from saap.criteria.saap_gates import _Gates
from saap.criteria.saap_plus import clearly_nearer
from saap.scoring.fisher import mask_gradient
from saap.scoring.statistics import output_matrices, taylor_sums
from tests.saap.models.families import build

backward, saap_gates, factors = (
    importlib.import_module(f"saap.{name}") for name in ("scoring.backward", "criteria.saap_gates", "criteria.factors")
)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))


def gate_slopes(model, tokens):
    with _Gates(model) as gates:
        dense = gates.final_states(tokens)
        gates.open = np.arange(len(gates.open)) % 5 > 0
        return gates.gradient(tokens, dense)


def factor_slopes(model, tokens):
    """Of LoRA's B and of LoRAShear's gates, one a matrix here, at the first step."""
    with factors.lora_factors(model, 0) as lora:
        gates = [torch.nn.Parameter(torch.ones(())) for _ in lora]
        for factor, gate in zip(lora, gates, strict=True):
            factor.linear.register_forward_hook(lambda _, x, y, gate=gate: y * gate.to(y.dtype))
        next(factors.training_steps(model, lora, tokens, 0, "lora", gates))
        for factor in lora:
            factor.linear._forward_hooks.popitem()
        return torch.cat([p.grad.flatten() for p in (*(factor.b for factor in lora), *gates)]).numpy()


SEEN = {
    "factors": factor_slopes,
    "fisher": mask_fisher,
    "gradient": mask_gradient,
    "taylor": lambda model, tokens: taylor_sums(model, tokens).param_first,
    "gates": gate_slopes,
}


@pytest.mark.parametrize("seen", SEEN)
def test_float16_gradients_that_would_be_zero_are_kept_by_scaling_the_loss(tiny_llama, tokens, seen, monkeypatch):
    """A small last norm and head make all gradients small, as a long sequence and a well trained model do."""
    half = tiny_llama(seed=3)
    with torch.no_grad():
        half.model.norm.weight.mul_(1e-2)
        half.lm_head.weight.mul_(1e-2)
    half = half.half()
    exact = SEEN[seen](copy.deepcopy(half).float(), tokens)
    error = np.linalg.norm(SEEN[seen](half, tokens) - exact) / np.linalg.norm(exact)
    assert error < (0.06 if seen == "gates" else 0.01)  # of gates also that of two softmaxes' difference
    for module in (backward, saap_gates, factors):
        monkeypatch.setattr(module, "LOSS_SCALES", (1.0,))
    assert np.linalg.norm(SEEN[seen](half, tokens) - exact) / np.linalg.norm(exact) > 3 * error


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_it_is_the_mean_squared_gradient_of_a_mask_for_each_sample_and_group(family, tiny_llama, tokens):
    model = tiny_llama() if family == "llama" else build("bloom")
    found = mask_fisher(model, tokens, batch_size=2)
    masks = []
    for _, _, part, linear in output_matrices(model):
        mask = torch.ones(len(tokens), 1, linear.in_features // part.width, requires_grad=True)
        linear.register_forward_pre_hook(
            lambda _, args, mask=mask, width=part.width: (args[0] * mask.repeat_interleave(width, -1),)
        )
        masks.append(mask)
    logits = model(tokens).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").div(tokens.shape[1] - 1).backward()
    wanted = np.concatenate([mask.grad.square().mean((0, 1)).numpy() for mask in masks])
    assert found.shape == (len(discover(model)),)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(mask_fisher(model, tokens, batch_size=5), found, rtol=1e-4, atol=1e-12)


def test_a_head_that_costs_as_much_as_a_channel_goes_first_because_it_is_larger(tiny_llama):
    model = tiny_llama()
    groups = discover(model)
    score = CRITERIA["saap_plus"](model, np.ones(len(groups)), torch.empty(0))
    np.testing.assert_allclose(score * groups.parameters, 1)
    assert score[groups.kind == "attention"].max() < score[groups.kind == "mlp"].min()


def test_ranking_again_after_a_cut_is_pruning_the_pruned_model_by_hand(tiny_llama, tokens):
    model = tiny_llama()
    groups, fisher, limits = discover(model), mask_fisher(model, tokens), {"protect": (0, -1), "align": 8}

    def kept(ratio, cuts):
        score = CRITERIA["saap_plus"](model, fisher, tokens, cuts, **limits)
        return np.flatnonzero(select(score, groups, ratio, **limits))

    total, wanted = groups.parameters.sum(), np.arange(len(groups))
    small, ratios = model, (0.15, 0.3, 0.45)
    for ratio in ratios:  # each time the groups that are left, their own Fisher information, the rest of the budget
        left = discover(small)
        score = mask_fisher(small, tokens) / left.parameters
        wanted = wanted[select(score, left, 1 - (1 - ratio) * total / left.parameters.sum(), **limits)]
        keep = np.isin(np.arange(len(groups)), wanted)
        small = refit(prune(model, keep), model, keep, tokens)
        assert np.array_equal(kept(ratio, [cut for cut in ratios if cut < ratio]), wanted)
        assert np.array_equal(kept(ratio, ratios[::-1]), wanted)  # later cuts change nothing that earlier ones took
    assert not np.array_equal(kept(0.45, ()), wanted)


def more_tokens():
    return torch.randint(0, 512, (20, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("useless", ["attention", "mlp"])
def test_heads_go_only_where_that_leaves_the_refitted_model_nearer_to_the_dense_one(tiny_llama, useless):
    """The score says heads; what is true is planted."""
    model, tokens = tiny_llama(), more_tokens()
    with torch.no_grad():
        for _, kind, _, linear in output_matrices(model):
            linear.weight.mul_(1e-3 if kind == useless else 3)
    groups, limits = discover(model), {"protect": (0, -1), "align": 8}
    fisher = np.random.default_rng(0).random(len(groups)) * groups.parameters
    heads = groups.kind == "attention"
    fisher[heads] *= 1e-3
    by_order = select(fisher / groups.parameters, groups, 0.3, **limits)
    spared = select(np.where(heads, 2, fisher / groups.parameters), groups, 0.3, **limits)
    assert not by_order[heads].all()
    assert spared[heads].all()
    held, far = np.arange(20) % 5 == 0, []
    for keep in (by_order, spared):
        small = refit(prune(model, keep), model, keep, tokens[~held], ridge=0.1)
        with torch.no_grad():
            own, theirs = (each(tokens[held]).logits.log_softmax(-1) for each in (small, model))
        far.append(F.kl_div(own, theirs, reduction="batchmean", log_target=True).item())
    assert (far[0] < far[1]) == (useless == "attention")
    score = CRITERIA["saap_plus"](model, fisher, tokens, (0.3,), "measured", 0.1, **limits)
    assert np.array_equal(select(score, groups, 0.3, **limits), by_order if useless == "attention" else spared)


@pytest.mark.parametrize(
    ("own", "clear"),
    [
        ([0.9, 1.0, 1.11, 1.19], True),  # paired 0.1 ± 0.004 nearer, though the sequences differ by as much
        ([0.7, 1.0, 1.1, 1.4], False),  # 0.1 ± 0.082 nearer
        ([1.1, 1.2, 1.3, 1.4], False),  # farther
    ],
)
def test_a_plan_is_clearly_nearer_by_two_standard_errors_of_the_paired_difference(own, clear):
    assert clearly_nearer(np.array(own), np.array([1.0, 1.1, 1.2, 1.3])) == clear


def test_heads_are_measured_at_every_cut_and_those_gone_stay_gone(tiny_llama):
    model, tokens = tiny_llama(), more_tokens()
    groups, limits = discover(model), {"protect": (0, -1), "align": 8}
    score = CRITERIA["saap_plus"](model, mask_fisher(model, tokens), tokens, (0.15, 0.3), "measured", **limits)
    assert sorted(score) == list(range(len(groups)))
    before = CRITERIA["saap_plus"](model, mask_fisher(model, tokens), tokens, (0.15,), "measured", **limits)
    assert not (select(score, groups, 0.3, **limits) & ~select(before, groups, 0.15, **limits)).any()
    for heads, cuts, few in (("measured", (), tokens), ("measured", (0.3,), tokens[:5]), ("some", (), tokens)):
        with pytest.raises(SaapError, match="heads"):
            CRITERIA["saap_plus"](model, np.ones(len(groups)), few, cuts, heads, **limits)


def test_a_broken_weight_is_an_error_that_names_the_place(tiny_llama, tokens):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SaapError, match=r"not finite: neither is model\.layers\.3\.mlp\.up_proj\.weight"):
        mask_fisher(model, tokens)
