"""Mixtures of experts: whole experts, channels inside them and heads, under one budget."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from saap import (
    CRITERIA,
    SaapError,
    discover,
    load,
    mask_fisher,
    prune,
    refit,
    removed_share,
    save,
    score,
    select,
    size_of,
    to_groupwise,
)
from saap.export.uniform import uniform
from tests.saap.models.families import GATED, GREEDY, IDS, SMALL, assert_same_bits, logits

E, WIDTH, LAYERS = 4, 12, 4
CASES = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "head_dim": 16},
    ),
    "qwen3_moe, weights that add up": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "norm_topk_prob": True},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": E, "intermediate_size": WIDTH}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "num_local_experts": E,
            "num_experts_per_tok": 2,
            "intermediate_size": WIDTH,
            "head_dim": 16,
            "pad_token_id": 2,
        },
    ),
}


def build(case):
    model_class, config_class, fields = CASES[case]
    torch.manual_seed(0)
    model = model_class(config_class(**(SMALL | GATED | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(params=CASES)
def model(request):
    return build(request.param)


def random_keep(model, seed=0):
    rng = np.random.default_rng(seed)
    groups = discover(model)
    keep = np.zeros(len(groups), bool)
    for layer in range(LAYERS):
        heads, experts, channels = (
            np.flatnonzero((groups.layer == layer) & (groups.kind == kind)) for kind in ("attention", "expert", "mlp")
        )
        keep[rng.permutation(heads)[: rng.integers(1, len(heads) + 1)]] = True
        stays = rng.permutation(len(experts))[: rng.integers(2, len(experts) + 1)]
        keep[experts[stays]] = True
        count = rng.integers(1, WIDTH + 1)
        for own in channels.reshape(len(experts), -1)[stays]:
            keep[rng.permutation(own)[:count]] = True
    return keep


def router_and_experts(layer):
    return getattr(layer.mlp, "gate", None) or layer.mlp.router, layer.mlp.experts


def plain_experts(module, gates, inner):
    """The mixture as the papers have it, each expert on every token; gates (E,) and inner (E, I) multiply."""

    def forward(x, index, weights):
        total = torch.zeros_like(x)
        for e in range(module.num_experts):
            if hasattr(module, "down_proj_bias"):
                both = x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
                gate, up = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
                hidden = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
                out = (hidden * inner[e]) @ module.down_proj[e] + module.down_proj_bias[e]
            else:
                both = x @ module.gate_up_proj[e].T
                hidden = nn.functional.silu(both[:, : both.shape[1] // 2]) * both[:, both.shape[1] // 2 :]
                out = (hidden * inner[e]) @ module.down_proj[e].T
            weight = ((index == e) * weights).sum(1, keepdim=True)
            total = total + gates[e] * weight * out
        return total

    return forward


def silenced(model, keep):
    """The dense model: its router never picks an expert that is gone, channels and heads that are gone give nothing."""
    model, groups = copy.deepcopy(model), discover(model)
    for number, layer in enumerate(model.model.layers):
        here = groups.layer == number
        heads, stays, channels = (keep[here & (groups.kind == kind)] for kind in ("attention", "expert", "mlp"))
        router, experts = router_and_experts(layer)
        with torch.no_grad():
            layer.self_attn.o_proj.weight.view(64, len(heads), -1)[:, ~torch.from_numpy(heads)] = 0

        def route(x, router=router, stays=stays):
            raw = nn.functional.linear(x.reshape(-1, 64), router.weight, getattr(router, "bias", None))
            raw = raw.masked_fill(~torch.from_numpy(stays), -torch.inf)
            if hasattr(router, "bias"):
                top, index = raw.topk(router.top_k, dim=-1)
                return raw, top.softmax(-1), index
            top, index = raw.softmax(-1).topk(router.top_k, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                top = top / top.sum(-1, keepdim=True)
            return raw, top, index

        router.forward = route
        inner = torch.from_numpy(channels.reshape(E, -1).astype(np.float32))
        experts.forward = plain_experts(experts, torch.ones(E), inner)
    return model


def test_a_group_is_a_head_an_expert_or_a_channel_of_one_and_they_add_up(model):
    groups = discover(model)
    for layer in range(LAYERS):
        here = groups.layer == layer
        counts = [int((here & (groups.kind == kind)).sum()) for kind in ("attention", "expert", "mlp")]
        assert counts == [2, E, E * WIDTH]
        router, experts = router_and_experts(model.model.layers[layer])
        held = sum(p.numel() for module in (router, experts) for p in module.parameters())
        assert groups.parameters[here & (groups.kind != "attention")].sum() == held
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


def test_the_fisher_information_is_that_of_masks_in_autograd(model):
    exact = copy.deepcopy(model).double()
    gates = [[torch.ones(n, dtype=torch.double, requires_grad=True) for n in (2, E, E * WIDTH)] for _ in range(LAYERS)]
    for layer, (heads, whole, inner) in zip(exact.model.layers, gates, strict=True):
        _, experts = router_and_experts(layer)
        experts.forward = plain_experts(experts, whole, inner.view(E, -1))
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, heads=heads: (args[0] * heads.repeat_interleave(args[0].shape[-1] // 2),)
        )
    squares = 0.0
    every = [gate for own in gates for gate in own]
    for ids in IDS[:, None]:
        loss = exact(ids, labels=ids).loss
        squares = squares + torch.cat(torch.autograd.grad(loss, every)).square()
    expected = (squares / len(IDS)).numpy()
    for batch_size in (1, 2):
        found = mask_fisher(model, IDS, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_reap_is_the_mean_of_router_weight_times_norm_over_an_experts_tokens(model):
    groups, expected = discover(model), {}
    for number, layer in enumerate(model.model.layers):
        _, experts = router_and_experts(layer)

        def see(module, args, number=number):
            x, index, weights = args
            for e in range(E):
                one = torch.zeros(E)
                one[e] = 1
                out = plain_experts(module, one, torch.ones(E, WIDTH))(x, index, weights)  # weight · output
                goes = (index == e).any(1)
                expected[number, e] = out[goes].norm(dim=1).mean().item() if goes.any() else 0.0

        experts.register_forward_pre_hook(see)
    logits(model)
    found = CRITERIA["reap"](model, IDS)
    np.testing.assert_allclose(found[groups.kind == "expert"], list(expected.values()), rtol=1e-4)
    assert found[groups.kind != "expert"].min() > found[groups.kind == "expert"].max()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_one_budget_over_heads_experts_and_channels_is_met_and_can_be_applied(model, ratio):
    groups = discover(model)
    worth = CRITERIA["saap_plus"](model, mask_fisher(model, IDS), IDS)
    keep = select(worth, groups, ratio, protect=(0,), align=4)
    largest = max(groups.costs.max(), 4 * E * groups.parameters[-1])
    assert removed_share(groups, keep) == pytest.approx(ratio, abs=0.5 * largest / groups.parameters.sum())
    small = prune(model, keep)
    for layer, config in enumerate(small.config.per_layer_config):
        kept = int(keep[(groups.layer == layer) & (groups.kind == "expert")].sum())
        assert kept >= config.num_experts_per_tok
        assert small.model.layers[layer].mlp.experts.num_experts == kept
    torch.testing.assert_close(logits(small), logits(silenced(model, keep)), rtol=1e-4, atol=1e-5)


def test_active_parameters_are_those_of_the_experts_a_router_picks(model):
    small = prune(model, random_keep(model))
    size, idle = size_of(small), 0
    macs = 512 * 64 + sum(m.weight.numel() for m in small.model.layers.modules() if isinstance(m, nn.Linear))
    for layer in small.model.layers:
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
    with pytest.raises(SaapError, match="criterion saap_plus"):
        score(model, IDS)
    with pytest.raises(SaapError, match="no stock form"):
        uniform(prune(model, random_keep(model)))
    with pytest.raises(SaapError, match="group-wise int4 is not available"):
        to_groupwise(model, 32)
    with pytest.raises(SaapError, match="compensation"):
        refit(prune(model, random_keep(model)), model, random_keep(model), IDS)
    with pytest.raises(SaapError, match="global"):
        select(np.ones(len(groups)), groups, 0.3, search="uniform")
    with pytest.raises(SaapError, match="cannot be reached"):
        select(np.random.default_rng(0).random(len(groups)), groups, 0.95, protect=())
