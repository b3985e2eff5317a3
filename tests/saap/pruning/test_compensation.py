"""FLAP's bias: against its closed form, against a masked model, and through a checkpoint and int4."""

import numpy as np
import pytest
import torch

import saap
from saap import add_mean_bias, discover, input_moments, mask, prune
from saap.scoring.statistics import output_matrices
from tests.saap.models.families import CASES, IDS, build


@pytest.fixture
def case(tiny_llama):
    model = tiny_llama()
    tokens = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(3))
    groups = discover(model)
    keep = np.random.default_rng(4).random(len(groups)) > 0.4
    for _, _, index in groups.structures():
        keep[index[0]] = True
    return model, keep, tokens, input_moments(model, tokens)


def test_the_bias_is_the_mean_of_what_was_removed(case):
    model, keep, _, moments = case
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    groups = discover(model)
    for layer, kind, index in groups.structures():
        module, lean = model.model.layers[layer], small.model.layers[layer]
        dense, linear = (
            (module.self_attn.o_proj, lean.self_attn.o_proj)
            if kind == "attention"
            else (module.mlp.down_proj, lean.mlp.down_proj)
        )
        gone = np.repeat(~keep[index], 32 if kind == "attention" else 1)
        wanted = (moments[layer, kind].mean * gone) @ dense.weight.detach().double().numpy().T
        np.testing.assert_allclose(linear.bias.detach().numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_the_small_model_equals_the_dense_one_whose_removed_inputs_are_their_means(case):
    model, keep, tokens, moments = case
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    groups = discover(model)
    handles = []
    for layer, kind, index in groups.structures():
        module = model.model.layers[layer]
        linear = module.self_attn.o_proj if kind == "attention" else module.mlp.down_proj
        gone = torch.from_numpy(np.repeat(~keep[index], 32 if kind == "attention" else 1))
        mean = torch.from_numpy(moments[layer, kind].mean).float()
        handles.append(
            linear.register_forward_pre_hook(lambda _, args, gone=gone, mean=mean: (torch.where(gone, mean, args[0]),))
        )
    with torch.no_grad():
        wanted = model(tokens).logits
        torch.testing.assert_close(small(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
        assert (mask(model, keep)(tokens).logits - wanted).abs().max() > 1e-2  # the bias does something


def test_biases_survive_the_checkpoint_int4_and_another_pruning(case, tmp_path):
    model, keep, tokens, moments = case
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    saap.save(small, tmp_path / "small")
    loaded = saap.load(tmp_path / "small")
    again = prune(loaded, np.ones(len(discover(loaded)), bool))
    int4 = saap.to_groupwise(loaded, 16)
    saap.save(int4, tmp_path / "int4")
    with torch.no_grad():
        wanted = small(tokens).logits
        assert torch.equal(loaded(tokens).logits, wanted)
        torch.testing.assert_close(again(tokens).logits, wanted)
        assert torch.equal(saap.load(tmp_path / "int4")(tokens).logits, int4(tokens).logits)
    for layer, other in zip(small.model.layers, int4.model.layers, strict=True):
        assert torch.equal(layer.mlp.down_proj.bias, other.mlp.down_proj.bias)
        assert torch.equal(layer.self_attn.o_proj.bias, other.self_attn.o_proj.bias)


@pytest.mark.parametrize("family", CASES)
def test_every_family_carries_the_biases_through_its_checkpoint(family, tmp_path):
    model = build(family)
    moments = input_moments(model, IDS)
    groups = discover(model)
    keep = np.ones(len(groups), bool)
    for layer, kind, index in groups.structures():
        rows = index.reshape(groups.stretches(layer, kind), -1)
        keep[index[3::7] if kind == "mlp" else rows[:, 1].ravel()] = False
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    for (layer, kind, part, dense), (*_, linear) in zip(output_matrices(model), output_matrices(small), strict=True):
        index = np.flatnonzero((groups.layer == layer) & (groups.kind == kind))
        gone = np.repeat(~keep[index], part.width)
        own = 0.0 if dense.bias is None else dense.bias.detach().double().numpy()
        wanted = own + (moments[layer, kind].mean * gone) @ dense.weight.detach().double().numpy().T
        np.testing.assert_allclose(linear.bias.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    saap.save(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(saap.load(tmp_path)(IDS).logits, small(IDS).logits)
