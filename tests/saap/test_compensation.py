"""FLAP's bias: against its closed form, against a masked model, and through a checkpoint and int4."""

import numpy as np
import pytest
import torch

import saap
from saap import add_mean_bias, discover, input_moments, mask, prune


@pytest.fixture
def case(tiny_llama):
    model = tiny_llama()
    tokens = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(3))
    groups = discover(model)
    keep = np.random.default_rng(4).random(len(groups)) > 0.4
    for _, _, index in groups.blocks():
        keep[index[0]] = True
    return model, keep, tokens, input_moments(model, tokens)


def test_the_bias_is_the_mean_of_what_was_removed(case):
    model, keep, _, moments = case
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    groups = discover(model)
    for layer, kind, index in groups.blocks():
        block, lean = model.model.layers[layer], small.model.layers[layer]
        dense, linear = (
            (block.self_attn.o_proj, lean.self_attn.o_proj)
            if kind == "attention"
            else (block.mlp.down_proj, lean.mlp.down_proj)
        )
        gone = np.repeat(~keep[index], 32 if kind == "attention" else 1)
        wanted = (moments[layer, kind].mean * gone) @ dense.weight.detach().double().numpy().T
        np.testing.assert_allclose(linear.bias.detach().numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_the_small_model_equals_the_dense_one_whose_removed_inputs_are_their_means(case):
    model, keep, tokens, moments = case
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    groups = discover(model)
    handles = []
    for layer, kind, index in groups.blocks():
        block = model.model.layers[layer]
        linear = block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj
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
    for block, other in zip(small.model.layers, int4.model.layers, strict=True):
        assert torch.equal(block.mlp.down_proj.bias, other.mlp.down_proj.bias)
        assert torch.equal(block.self_attn.o_proj.bias, other.self_attn.o_proj.bias)


def test_a_family_with_biases_of_its_own_has_them_added_to():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=3, n_head=4)).eval()
    tokens = torch.randint(0, 128, (3, 10))
    moments = input_moments(model, tokens)
    keep = np.ones(len(discover(model)), bool)
    keep[[0, 7, 9]] = False
    before = model.transformer.h[0].mlp.dense_4h_to_h.bias.clone()
    small = add_mean_bias(prune(model, keep), model, keep, moments)
    weight = model.transformer.h[0].mlp.dense_4h_to_h.weight.double()
    gone = torch.from_numpy(moments[0, "mlp"].mean)[[3, 5]]
    added = small.transformer.h[0].mlp.dense_4h_to_h.bias - before
    torch.testing.assert_close(added.double(), weight[:, [3, 5]] @ gone, rtol=1e-3, atol=1e-7)
