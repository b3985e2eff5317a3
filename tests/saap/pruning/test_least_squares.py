"""The refit of output matrices: against numpy's least squares, on planted redundancy, and for every kind of family."""

import weakref

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Qwen2Config, Qwen2ForCausalLM

from saap import SaapError, discover, prune, refit
from saap.models.stream import Pass
from saap.pruning.least_squares import RIDGES, refit_together
from tests.saap.models.families import build
from tests.saap.models.families import random_keep as evenly_kept


@pytest.fixture
def tokens():
    return torch.randint(0, 512, (6, 24), generator=torch.Generator().manual_seed(1))


def without(model, *gone):
    """keep, all but the groups (layer, kind, unit)."""
    groups = discover(model)
    keep = np.ones(len(groups), bool)
    for layer, kind, unit in gone:
        keep[(groups.layer == layer) & (groups.kind == kind) & (groups.unit == unit)] = False
    return keep


def random_keep(model, share=0.6, seed=0):
    groups = discover(model)
    keep = np.random.default_rng(seed).random(len(groups)) < share
    for _, _, index in groups.structures():
        keep[index[0]] = True
    return keep


def distance(model, small, tokens):
    with torch.no_grad():
        return (model(tokens).logits - small(tokens).logits).square().mean().item()


def qwen2():
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "initializer_range": 0.1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=512, intermediate_size=96, **small)).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=512, hidden_size=64, n_layer=4, n_head=4, initializer_range=0.1)
    ).eval()


def numpys(rows, wanted, ridge):
    """numpy's ridge regression of wanted on rows, the ridge in units of the mean square of a column."""
    penalty = np.sqrt(ridge * np.square(rows).sum() / rows.shape[1]) * np.eye(rows.shape[1])
    nothing = np.zeros((rows.shape[1], wanted.shape[1]))
    return np.linalg.lstsq(np.vstack([rows, penalty]), np.vstack([wanted, nothing]), rcond=None)[0]


@pytest.mark.parametrize("ridge", [0.2, "held_out"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_the_weights_are_those_of_numpys_weighted_ridge_regression(tiny_llama, kind, ridge):
    tokens = torch.randint(0, 512, (11, 24), generator=torch.Generator().manual_seed(1))
    model = tiny_llama()
    keep = without(model, (2, kind, 1), *([(2, kind, 5)] if kind == "mlp" else []))
    layer = model.model.layers[2]
    with torch.no_grad():  # channel 5 nearly does what channel 3 does
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight[5] = 0.3 * matrix.weight[5] + matrix.weight[3]
    linear = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
    seen = {}
    norm = layer.post_attention_layernorm
    handles = [
        linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        # the stream behind o_proj enters the second norm, that behind down_proj leaves the layer
        norm.register_forward_pre_hook(lambda _, args: seen.update(attention=args[0])),
        layer.register_forward_hook(lambda _, args, out: seen.update(mlp=out)),
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    x = seen["x"].flatten(0, 1).double().numpy()
    stays = np.ones(x.shape[1], bool)
    stays[32:64] = kind != "attention"
    stays[[1, 5]] &= kind != "mlp"
    weight = linear.weight.detach().double().numpy()
    root = 1 / np.linalg.norm(seen[kind].flatten(0, 1).double().numpy(), axis=1, keepdims=True)
    rows, wanted = root * x[:, stays], root * (x[:, ~stays] @ weight[:, ~stays].T)
    best = ridge
    if ridge == "held_out":
        held = np.arange(11).repeat(24) % 5 == 0
        errors = {
            each: np.square(wanted[held] - rows[held] @ numpys(rows[~held], wanted[~held], each)).sum()
            for each in RIDGES
        }
        best = min(errors, key=errors.get)
        assert best < max(RIDGES)
    change = numpys(rows, wanted, best)
    small = refit(prune(model, keep), model, keep, tokens, ridge=ridge)
    lean = small.model.layers[2]
    found = (lean.self_attn.o_proj if kind == "attention" else lean.mlp.down_proj).weight.detach().numpy()
    np.testing.assert_allclose(found, weight[:, stays] + change.T, rtol=1e-3, atol=1e-5)
    assert np.abs(change).max() > 1e-3
    again = refit(prune(model, keep), model, keep, tokens, ridge=ridge, batch_size=3)
    assert distance(small, again, tokens) < 1e-9


def test_what_the_channels_that_stay_can_say_is_not_lost(tiny_llama, tokens):
    model = tiny_llama()
    gone = []
    with torch.no_grad():
        for layer, module in enumerate(model.model.layers):
            for matrix in (module.mlp.gate_proj, module.mlp.up_proj):  # channel 7 does what channel 3 does
                matrix.weight[7] = matrix.weight[3]
            gone.append((layer, "mlp", 7))
    keep = without(model, *gone)
    assert distance(model, prune(model, keep), tokens) > 1e-3
    assert distance(model, refit(prune(model, keep), model, keep, tokens, ridge=1e-6), tokens) < 1e-6


def test_a_block_makes_up_for_the_blocks_before_it(tiny_llama, tokens):
    """Only what the last layer's own columns say is left to it when the drift of the stream is not seen."""
    model = tiny_llama()
    keep = without(model, *((1, "mlp", unit) for unit in range(64)), (5, "mlp", 0))
    small = refit(prune(model, keep), model, keep, tokens, ridge=0.01)
    alone = without(model, (5, "mlp", 0))
    unaware = refit(prune(model, alone), model, alone, tokens, ridge=0.01)
    blind = prune(model, keep)
    blind.model.layers[1].load_state_dict(small.model.layers[1].state_dict())
    blind.model.layers[5].load_state_dict(unaware.model.layers[5].state_dict())
    assert distance(model, small, tokens) < 0.9 * distance(model, blind, tokens)


OTHERS = ("gemma2", "granite", "glm4", "phi3", "olmo2", "cohere2")


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", *OTHERS])
def test_every_family_gets_closer_to_its_dense_model_and_keeps_its_shapes_and_biases(family, tiny_llama, tokens):
    if family in OTHERS:
        model = build(family)
        keep = evenly_kept(model, 1)
    else:
        model = {"llama": tiny_llama, "qwen2": qwen2, "bloom": bloom}[family]()
        keep = random_keep(model)
    plain, small = prune(model, keep), prune(model, keep)
    assert refit(small, model, keep, tokens, ridge=0.01) is small
    # behind a norm, attention that was rescaled or lost its direction cannot be made good by one matrix
    assert distance(model, small, tokens) < (0.7 if family in OTHERS else 0.3) * distance(model, plain, tokens)
    for (name, after), before in zip(small.state_dict().items(), plain.state_dict().values(), strict=True):
        assert after.shape == before.shape
        output = name.endswith(("o_proj.weight", "down_proj.weight", "dense.weight", "dense_4h_to_h.weight"))
        assert output or torch.equal(after, before), name
    again = refit(prune(model, keep), model, keep, tokens, ridge=0.01, batch_size=5)
    assert distance(small, again, tokens) < 1e-9


def test_a_model_that_lost_nothing_is_left_as_it_is(tiny_llama, tokens):
    model = tiny_llama()
    keep = without(model)
    small = refit(prune(model, keep), model, keep, tokens)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in (*small.modules(), *model.modules()))
    assert all("forward" not in vars(layer) for layer in (*small.model.layers, *model.model.layers))


def test_bfloat16_is_refitted_too(tiny_llama, tokens):
    model = tiny_llama().to(torch.bfloat16)
    keep = random_keep(model)
    plain = prune(model, keep)
    small = refit(prune(model, keep), model, keep, tokens, ridge=0.01)
    assert small.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert distance(model, small, tokens) < 0.5 * distance(model, plain, tokens)


def test_dead_inputs_change_nothing_and_broken_ones_are_an_error(tiny_llama, tokens):
    model = tiny_llama()
    keep = without(model, (2, "mlp", 0))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.zero_()
    small = prune(model, keep)
    before = small.model.layers[2].mlp.down_proj.weight.clone()
    assert torch.equal(refit(small, model, keep, tokens).model.layers[2].mlp.down_proj.weight, before)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(SaapError, match="not finite"):
        refit(prune(model, keep), model, keep, tokens)
    for ridge, few in ((0, tokens), ("some", tokens), ("held_out", tokens[:1])):
        with pytest.raises(SaapError, match="ridge"):
            refit(prune(model, keep), model, keep, few, ridge=ridge)
    small = prune(model, keep)
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(SaapError, match="device"):
        refit(small, model, keep, tokens)
    other = bloom()
    other.config.apply_residual_connection_post_layernorm = True
    with pytest.raises(SaapError, match="BLOOM"):
        refit(other, other, keep, tokens)


@pytest.mark.parametrize("make", [qwen2, bloom, lambda: build("gemma2")], ids=["qwen2", "bloom", "gemma2"])
def test_several_prunings_refitted_together_are_those_refitted_alone(make, tokens):
    model = make()
    groups = discover(model)
    keeps = [random_keep(model), random_keep(model, seed=1) | (groups.kind == "attention"), np.ones(len(groups), bool)]
    together = refit_together([prune(model, keep) for keep in keeps], model, keeps, tokens)
    for keep, small in zip(keeps, together, strict=True):
        alone = refit(prune(model, keep), model, keep, tokens)
        assert all(map(torch.equal, small.state_dict().values(), alone.state_dict().values()))
        assert not any(m._forward_hooks for m in small.modules())


@pytest.mark.parametrize("make", [qwen2, bloom])
def test_batch_after_batch_is_let_go(make, tokens, monkeypatch):
    """What a layer computes is large: of thousands of sequences only what enters the MLP's matrix may stay."""
    model, alive, most = make(), weakref.WeakSet(), []
    keep = random_keep(model)

    def made(self):
        self.x, self.y = {}, {}
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(Pass, "__init__", made)
    refit(prune(model, keep), model, keep, tokens, batch_size=1)
    assert len(most) > 40
    assert max(most) <= 4
