"""saap_gates: gradients against autograd, the projection by hand, and a model whose channels repeat each other."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import saap
from saap import CRITERIA, choose_heads, discover, select
from saap.criteria.saap_gates import _Gates, _projected


def tokens_of(count, length=16):
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(2))


def test_the_gradient_of_every_gate_is_that_of_the_divergence_from_the_dense_model(tiny_llama):
    model, tokens = tiny_llama(n_kv=4), tokens_of(3)
    groups = discover(model)
    shut = np.random.default_rng(0).random(len(groups)) < 0.3
    with _Gates(model) as gates:
        dense = gates.final_states(tokens)
        gates.open = ~shut
        found = gates.gradient(tokens, dense)
    assert not any(module._forward_pre_hooks for module in model.modules())

    oracle, leaves = tiny_llama(n_kv=4).double(), []
    with torch.no_grad():
        wanted = oracle(tokens).logits.log_softmax(-1).flatten(0, 1)
    for layer, kind, index in groups.structures():
        module = oracle.model.layers[layer]
        linear, width = (module.self_attn.o_proj, 16) if kind == "attention" else (module.mlp.down_proj, 1)
        leaves.append(torch.tensor((~shut[index]).astype(float), requires_grad=True))
        linear.register_forward_pre_hook(
            lambda _, args, gate=leaves[-1], width=width: (args[0] * gate.repeat_interleave(width),)
        )
    own = oracle(tokens).logits.log_softmax(-1).flatten(0, 1)
    F.kl_div(own, wanted, log_target=True, reduction="batchmean").backward()
    np.testing.assert_allclose(found, torch.cat([leaf.grad for leaf in leaves]).numpy(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "kept"), [(6, [1, 0, 1, 0, 1]), (5.9, [1, 1, 1, 0, 1]), (0, [1, 1, 1, 1, 1]), (16, [1, 0, 0, 0, 1])]
)
def test_the_lowest_gates_are_shut_as_far_as_they_fit_into_the_budget(budget, kept):
    logits, parameters = np.array([3.0, -1.0, 0.0, -2.0, np.inf]), np.array([5, 4, 10, 2, 1])
    assert _projected(logits, parameters, budget).tolist() == [bool(k) for k in kept]


@pytest.mark.parametrize("name", ["saap_gates", "gisp", "saap_plus"])
def test_no_head_goes_while_ranking_where_channels_alone_may(tiny_llama, name, monkeypatch):
    model, tokens = tiny_llama(n_kv=4), tokens_of(12)
    groups = discover(model)
    heads = groups.kind == "attention"
    fisher = np.where(heads, 1e-9, 1.0) * np.random.default_rng(0).random(len(groups))  # heads are worth nothing
    given = {"gisp": (tokens, 0.1), "saap_gates": (fisher, tokens, 0.1, 0), "saap_plus": (fisher, tokens, (0.1,))}
    score = CRITERIA[name](model, *given[name], protect=(0, -1), kinds="mlp")
    if name == "saap_gates":  # the gates of heads stay as they began: in the order of the start
        assert (np.diff(score[heads][np.argsort((fisher / groups.parameters)[heads])]) > 0).all()
        assert np.corrcoef(score[~heads].argsort().argsort(), fisher[~heads].argsort().argsort())[0, 1] < 0.9999
    else:  # what went is first in the order
        keep = select(score, groups, 0.09 if name == "gisp" else 0.1, protect=(0, -1), kinds="mlp", align=1)
        assert score[heads].min() > score[~heads][~keep[~heads]].max()


def test_training_brings_the_pruned_model_nearer_to_the_dense_one_than_the_order_it_starts_from(
    tiny_llama, monkeypatch
):
    """On text it has not seen, from a start that says nothing: gates in an order by chance."""
    for constant, value in (("STEPS", 60), ("STEEPNESS", 0.5), ("LEARNING_RATE", 0.05)):  # few, but long steps
        monkeypatch.setattr(sys.modules[_Gates.__module__], constant, value)  # the module's name is its function's too
    model, (tokens, others) = tiny_llama(n_kv=4), tokens_of(128).split(64)
    groups, ratio, limits = discover(model), 0.15, {"protect": (0, -1)}
    fisher = np.random.default_rng(0).random(len(groups)) * groups.parameters

    def distance(score):
        small = saap.prune(model, select(score, groups, ratio, align=1, **limits))
        with torch.no_grad():
            own, dense = (net(others).logits.log_softmax(-1).flatten(0, 1) for net in (small, model))
        return F.kl_div(own, dense, log_target=True, reduction="batchmean").item()

    learned = CRITERIA["saap_gates"](model, fisher, tokens, ratio, 0, **limits)
    assert distance(learned) < 0.7 * distance(fisher / groups.parameters)


def trained(monkeypatch, model, fisher, ratio):
    """Its scores after eight steps, and the gates that were open at each."""
    monkeypatch.setattr(sys.modules[_Gates.__module__], "STEPS", 8)
    seen, gradient = [], _Gates.gradient

    def watched(self, *given):
        seen.append(self.open)
        return gradient(self, *given)

    monkeypatch.setattr(_Gates, "gradient", watched)
    return CRITERIA["saap_gates"](model, fisher, tokens_of(8), ratio, 0, protect=(0, -1)), seen


def test_query_heads_are_shut_evenly_under_each_kv_head(tiny_llama, monkeypatch):
    model = tiny_llama(hidden_size=128, num_attention_heads=8)
    choose_heads(model, "query")
    groups = discover(model)
    fisher = np.random.default_rng(0).random(len(groups)) * groups.parameters
    for is_open in trained(monkeypatch, model, fisher, 0.3)[1]:
        under = is_open[groups.kind == "attention"].reshape(6, 2, 4).sum(2)
        assert (under < 4).any()
        assert (under[:, 0] != under[:, 1]).sum() <= 1  # where the budget ends


def test_a_budget_below_every_group_shuts_no_gate(tiny_llama, monkeypatch):
    model = tiny_llama()
    score, seen = trained(monkeypatch, model, np.random.default_rng(0).random(len(discover(model))), 1e-4)
    assert np.isfinite(score).all()
    assert np.all(seen)
