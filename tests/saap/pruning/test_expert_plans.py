"""Plans over heads, experts and channels of experts, and what makes up for them."""

import copy

import numpy as np
import pytest
import torch

from saap import CRITERIA, SaapError, discover, mask_fisher, prune, refit, removed_share, select
from tests.saap.models.families import IDS, logits
from tests.saap.models.mixtures import (
    CASES,
    WIDTH,
    E,
    build,
    entering,
    mixed,
    random_keep,
    router_and_experts,
    silenced,
)


@pytest.fixture(params=CASES)
def model(request):
    return build(request.param)


@pytest.fixture
def qwen():
    return build("qwen3_moe")


def kept(groups, keep, layer):
    """How many heads, experts and channels an expert stay."""
    here = groups.layer == layer
    heads, experts, channels = (
        int(keep[here & (groups.kind == kind)].sum()) for kind in ("attention", "expert", "mlp")
    )
    return heads, experts, channels // max(experts, 1)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_one_budget_over_heads_experts_and_channels_is_met_and_can_be_applied(model, ratio):
    groups = discover(model)
    worth = CRITERIA["saap_plus"](model, mask_fisher(model, IDS), IDS)
    keep = select(worth, groups, ratio, protect=(0,), align=4)
    largest = max(groups.costs.max(), 4 * E * groups.parameters[-1])
    assert removed_share(groups, keep) == pytest.approx(ratio, abs=0.5 * largest / groups.parameters.sum())
    small = prune(model, keep)
    for number, layer in enumerate(small.model.layers):
        _, experts, channels = kept(groups, keep, number)
        if mixed(layer):
            assert experts >= 2
            assert router_and_experts(layer)[1].num_experts == experts
            assert channels % 4 == 0
    torch.testing.assert_close(logits(small), logits(silenced(model, keep)), rtol=1e-4, atol=1e-5)


def test_a_step_of_channels_is_worth_what_those_of_the_experts_that_stay_are(qwen):
    groups = discover(qwen)
    mixtures = groups.mixtures()
    worth = np.full(len(groups), 100.0)
    for layer, value in ((1, 5.0), (2, 10.0)):
        worth[mixtures[layer][1]] = value
    gone = mixtures[2][0][3]
    # the expert goes first; with its channels counted, layer 2's others would be worth 4 and go before layer 1's
    worth[gone], worth[mixtures[2][1][3]] = -50.0, -14.0
    step = 4 * E * int(groups.parameters[mixtures[1][1][0, 0]])
    ratio = (int(groups.costs[gone]) + step) / groups.parameters.sum()
    keep = select(worth, groups, ratio, protect=(0, 3), align=4)
    assert kept(groups, keep, 2)[1:] == (E - 1, WIDTH)
    assert kept(groups, keep, 1)[1:] == (E, WIDTH - 4)


@pytest.mark.parametrize(("align", "left"), [(4, {4, 8, 12}), (5, {5, 10, 12}), (8, {8, 12}), (12, {12}), (20, {12})])
def test_channels_stay_in_steps_or_whole(qwen, align, left):
    groups = discover(qwen)
    worth = np.random.default_rng(0).random(len(groups))
    for ratio in (0.1, 0.2, 0.3):
        keep = select(worth, groups, ratio, protect=(), align=align)
        assert {kept(groups, keep, layer)[2] for layer in range(4)} <= left


@pytest.mark.parametrize("kinds", ["pooled", "mlp"])
@pytest.mark.parametrize("search", ["uniform", "uniform_down"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_a_uniform_plan_leaves_as_much_of_every_layer(qwen, ratio, search, kinds):
    groups = discover(qwen)
    worth = np.random.default_rng(0).random(len(groups))
    keep = select(worth, groups, ratio, protect=(), align=2, search=search, kinds=kinds)
    ((heads, experts, channels),) = {kept(groups, keep, layer) for layer in range(4)}
    share, total = ratio, groups.parameters.sum()
    if kinds == "mlp":
        assert heads == 2
        share = ratio * total / groups.parameters[groups.kind != "attention"].sum()
    assert experts >= E * (1 - share) - 1
    step = 2 * E * groups.parameters[-1]
    assert removed_share(groups, keep) == pytest.approx(ratio, abs=4 * step / 2 / total)
    for _, index in groups.mixtures().values():
        for own in index[keep[index].any(1)]:
            assert worth[own[keep[own]]].min() > worth[own[~keep[own]]].max(initial=0)
    assert kinds == "pooled" or channels < WIDTH or experts < E


def test_a_plan_that_cannot_be_is_refused(qwen):
    groups = discover(qwen)
    worth = np.random.default_rng(0).random(len(groups))
    for search in ("global", "uniform"):
        with pytest.raises(SaapError, match=r"ratio|layer"):
            select(worth, groups, 0.95, protect=(), search=search, align=4)
    with pytest.raises(SaapError, match=r"prune\.kinds"):
        select(worth, groups, 0.3, kinds="equal")


def error(small, model):
    return (logits(small) - logits(model)).square().mean().item()


def test_the_refit_brings_a_pruned_mixture_nearer_to_the_dense_one(model):
    keep = random_keep(model, 1)
    small = prune(model, keep)
    before = error(small, model)
    assert refit(small, model, keep, IDS) is small
    assert error(small, model) < 0.8 * before
    assert error(refit(prune(model, keep), model, keep, IDS, ridge="held_out"), model) < before
    same = prune(model, keep)
    refit(same, model, keep, IDS, ridge=1e12)
    torch.testing.assert_close(logits(same), logits(prune(model, keep)), rtol=1e-3, atol=1e-3)
    by_one = refit(prune(model, keep), model, keep, IDS, batch_size=1)
    torch.testing.assert_close(logits(by_one), logits(small), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_each_expert_is_fitted_to_what_those_before_it_left(case):
    """The last layer loses experts and channels: its fit against numpy's least squares, with the ridge as rows."""
    model = build(case)
    groups, keep = discover(model), random_keep(model, 2)
    keep[(groups.layer < 3) | (groups.kind == "attention")] = True
    small, seen = prune(model, keep), {}
    fitted = refit(copy.deepcopy(small), model, keep, IDS)
    for name, own in (("dense", model), ("small", small)):
        own.model.layers[3].register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.flatten(0, 1).double().numpy()})
        )
    (_, experts), (_, after) = (router_and_experts(own.model.layers[3]) for own in (small, fitted))
    experts.register_forward_pre_hook(lambda _, args: seen.update(routed=args))
    logits(model), logits(small)
    x, index, weights = seen["routed"]
    h, drift = seen["dense"], seen["dense"] - seen["small"]
    for e in range(experts.num_experts):
        token = (index == e).any(1).numpy()
        phi = (entering(experts, e, x) * ((index == e) * weights).sum(1, keepdim=True)).double().numpy()[token]
        scale = np.linalg.norm(h[token], axis=1, keepdims=True)
        ridge = np.sqrt(np.square(phi / scale).sum(0).mean()) * np.eye(phi.shape[1])
        rows = np.vstack([phi / scale, ridge]), np.vstack([drift[token] / scale, np.zeros((len(ridge), h.shape[1]))])
        change, *_ = np.linalg.lstsq(*rows, rcond=None)
        drift[token] -= phi @ change
        found = (after.down_proj[e] - experts.down_proj[e]).numpy()
        np.testing.assert_allclose(found if case == "gpt_oss" else found.T, change, rtol=1e-2, atol=1e-4)
