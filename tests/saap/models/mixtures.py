"""Mixtures of experts as tests make them, and the oracle of their pruning: a router that never picks what is gone."""

import copy

import numpy as np
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from saap import discover
from tests.saap.models.families import GATED, SMALL

E, WIDTH, LAYERS = 4, 12, 4
QWEN = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
CASES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"head_dim": 16}),
    "qwen3_moe, weights that add up": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"norm_topk_prob": True}),
    "qwen3_moe, layer 1 without experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"mlp_only_layers": [1]}),
    "qwen3_moe, experts in every second layer": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        QWEN | {"decoder_sparse_step": 2, "norm_topk_prob": True},
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


def mixed(layer):
    return hasattr(layer.mlp, "experts")


def router_and_experts(layer):
    return getattr(layer.mlp, "gate", None) or layer.mlp.router, layer.mlp.experts


def random_keep(model, seed=0):
    rng = np.random.default_rng(seed)
    groups = discover(model)
    keep = np.zeros(len(groups), bool)
    for number, layer in enumerate(model.model.layers):
        heads, experts, channels = (
            np.flatnonzero((groups.layer == number) & (groups.kind == kind)) for kind in ("attention", "expert", "mlp")
        )
        keep[rng.permutation(heads)[: rng.integers(1, len(heads) + 1)]] = True
        if not mixed(layer):
            keep[rng.permutation(channels)[: rng.integers(1, len(channels) + 1)]] = True
            continue
        stays = rng.permutation(len(experts))[: rng.integers(2, len(experts) + 1)]
        keep[experts[stays]] = True
        count = rng.integers(1, WIDTH + 1)
        for own in channels.reshape(len(experts), -1)[stays]:
            keep[rng.permutation(own)[:count]] = True
    return keep


def entering(module, e, x):
    """What enters the down_proj of expert e, (tokens, I), by the papers' formulas."""
    if hasattr(module, "down_proj_bias"):
        both = x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(module.alpha * gate)
    gate, up = (x @ module.gate_up_proj[e].T).chunk(2, dim=1)
    return nn.functional.silu(gate) * up


def plain_experts(module, gates, inner):
    """The mixture as the papers have it, each expert on every token; gates (E,) and inner (E, I) multiply."""

    def forward(x, index, weights):
        total = torch.zeros_like(x)
        for e in range(module.num_experts):
            hidden = entering(module, e, x) * inner[e]
            if hasattr(module, "down_proj_bias"):
                out = hidden @ module.down_proj[e] + module.down_proj_bias[e]
            else:
                out = hidden @ module.down_proj[e].T
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
        with torch.no_grad():
            layer.self_attn.o_proj.weight.view(64, len(heads), -1)[:, ~torch.from_numpy(heads)] = 0
            if not mixed(layer):
                layer.mlp.down_proj.weight[:, ~torch.from_numpy(channels)] = 0
                continue
        router, experts = router_and_experts(layer)

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
