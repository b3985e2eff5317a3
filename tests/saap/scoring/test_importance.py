import copy

import numpy as np
import pytest
import torch

from saap import SaapError, score
from saap.scoring import importance

BACKWARD = importance.backward
TOKENS = torch.randint(0, 512, (5, 17), generator=torch.Generator().manual_seed(1))


def plain_scores(model, tokens, hessian="none", vector_unit="row"):
    """Method §2 word for word in float64: batch 1, gradients of all weights, sums over slices."""
    model = copy.deepcopy(model).double()
    d, n_kv = model.config.head_dim, model.config.num_key_value_heads
    wide = model.config.num_attention_heads // n_kv * d
    vectors, elements = [], []
    for ids in tokens[:, None]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        vector, element = [], []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            attention = [(a.q_proj, 0, wide), (a.k_proj, 0, d), (a.v_proj, 0, d), (a.o_proj, 1, wide)]
            heads = n_kv
            if n_kv == 1:  # a group is a query head, k and v stay
                heads, attention = model.config.num_attention_heads, [(a.q_proj, 0, d), (a.o_proj, 1, d)]
            mlp = [(m.gate_proj, 0, 1), (m.up_proj, 0, 1), (m.down_proj, 1, 1)]
            for units, matrices in ((heads, attention), (m.up_proj.out_features, mlp)):
                salience = [(w.weight * w.weight.grad).detach().numpy() for w, _, _ in matrices]
                for u in range(units):
                    coarse, fine, signed = 0.0, 0.0, 0.0
                    for (_, axis, width), s in zip(matrices, salience, strict=True):
                        rows = (s if axis == 0 else s.T)[u * width : (u + 1) * width]
                        second = rows - 0.5 * rows**2
                        chosen = second if hessian == "fisher" else rows
                        coarse += np.abs(chosen.sum(1)).sum()
                        signed += chosen.sum()
                        fine += np.abs(second).sum()
                    vector.append(abs(signed) if vector_unit == "group" else coarse)
                    element.append(fine)
        vectors.append(vector)
        elements.append(element)
    return np.array(vectors), np.array(elements)


def assert_close(found, expected):
    """To 1e-4; where the vector score's |Σ s| cancels, float32 leaves some of the Σ |s| it cancelled from."""
    (vector, element), (plain_vector, plain_element) = found, expected
    assert vector.dtype == element.dtype == np.float32
    np.testing.assert_allclose(element, plain_element, rtol=1e-4)
    assert (np.abs(vector - plain_vector) <= 1e-4 * plain_vector + 1e-5 * plain_element).all()


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def case(request, tiny_llama):
    model = tiny_llama(request.param)
    return model, plain_scores(model, TOKENS)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_scores_equal_plain_autograd_whatever_the_batch_size(case, batch_size):
    model, expected = case
    assert_close(score(model, TOKENS, batch_size=batch_size), expected)


def test_layers_repeated_in_the_backward_give_the_same_scores(tiny_llama, monkeypatch):
    """As on a GPU, where a pass keeps the inputs of layers only."""
    expected = score(tiny_llama(), TOKENS)
    monkeypatch.setattr(importance, "backward", lambda *inputs, **_: BACKWARD(*inputs, recompute=True))
    for found, kept in zip(score(tiny_llama(), TOKENS), expected, strict=True):
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize(("hessian", "vector_unit"), [("fisher", "row"), ("none", "group"), ("fisher", "group")])
def test_each_switch_changes_the_vector_score_by_its_formula_and_leaves_the_element_score(case, hessian, vector_unit):
    model, (plain_vector, plain_element) = case
    vector, element = score(model, TOKENS[:3], hessian=hessian, vector_unit=vector_unit, batch_size=2)
    assert_close((vector, element), plain_scores(model, TOKENS[:3], hessian, vector_unit))
    assert not np.allclose(vector, plain_vector[:3], rtol=1e-3)
    np.testing.assert_allclose(element, plain_element[:3], rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"intermediate_size": 3000, "num_hidden_layers": 1},
    ],
    ids=["biases", "tied", "matrices of several tiles"],
)
def test_scores_equal_plain_autograd_for_other_shapes(tiny_llama, config):
    model = tiny_llama(**config)
    assert_close(score(model, TOKENS[:2]), plain_scores(model, TOKENS[:2]))


@pytest.mark.parametrize(("dtype", "bounds"), [("bfloat16", (0.03, 0.02)), ("float16", (4e-3, 2e-3))])
def test_half_precision_scores_are_near_those_of_the_same_weights_in_float64(tiny_llama, dtype, bounds):
    """Bounds in the norm of a sample: 8 or 11 bits are kept, and the vector score is a sum that cancels."""
    half = tiny_llama(seed=3).to(getattr(torch, dtype))
    assert max(errors_of(score(half, TOKENS), plain_scores(half, TOKENS)) / bounds) < 1


def errors_of(found, exact):
    """The largest relative error of a sample, in norm, of vector and element."""
    return np.array([
        (np.linalg.norm(mine - plain, axis=1) / np.linalg.norm(plain, axis=1)).max()
        for mine, plain in zip(found, exact, strict=True)
    ])  # fmt: skip


def test_float16_gradients_that_would_be_zero_are_kept_by_scaling_the_loss(tiny_llama, monkeypatch):
    """A small last norm and head make all gradients small, as a long sequence and a well trained model do."""
    half = tiny_llama(seed=3)
    with torch.no_grad():
        half.model.norm.weight.mul_(1e-3)
        half.lm_head.weight.mul_(1e-3)
    half = half.half()
    exact = plain_scores(half, TOKENS)
    assert max(errors_of(score(half, TOKENS), exact)) < 0.01
    monkeypatch.setattr(importance, "LOSS_SCALES", (1.0,))
    unscaled = score(half, TOKENS)
    assert min(errors_of(unscaled, exact)) > 0.1
    assert ((unscaled[1] == 0) & (exact[1] > 0)).any()


def test_a_sample_whose_scaled_gradients_overflow_is_done_again_and_no_other(tiny_llama, monkeypatch):
    half, large, small = tiny_llama(seed=3).half(), 2.0**19, 2.0**8

    def alone(sample, scale):
        monkeypatch.setattr(importance, "LOSS_SCALES", (scale,))
        return score(half, TOKENS[sample : sample + 1])

    expected, overflow = [], 0
    for sample in range(len(TOKENS)):
        try:
            expected.append(alone(sample, large))
        except SaapError:
            overflow += 1
            expected.append(alone(sample, small))
    assert 0 < overflow < len(TOKENS)
    calls = []
    monkeypatch.setattr(importance, "backward", lambda m, batch, scale, **_: calls.append((len(batch), scale))
                        or BACKWARD(m, batch, scale))  # fmt: skip
    monkeypatch.setattr(importance, "LOSS_SCALES", (large, small))
    for found, parts in zip(score(half, TOKENS), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-3)
    assert calls == [(len(TOKENS), large), (overflow, small)]


@pytest.mark.parametrize("broken", [False, True])
def test_scoring_leaves_weights_flags_and_gradients_as_they_were(tiny_llama, broken):
    model = tiny_llama()
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    if broken:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(torch.nan)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if broken:
        with pytest.raises(SaapError):
            score(model, TOKENS)
    else:
        score(model, TOKENS)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_that_is_not_a_number_is_named_with_layer_matrix_and_sample(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[7, 9] = torch.nan
    with pytest.raises(SaapError, match=r"layer 3, mlp\.up_proj, sample 0"):
        score(model, TOKENS)


def test_the_sample_whose_score_is_not_finite_is_named(tiny_llama):
    model = tiny_llama()
    tokens = TOKENS.clone() % 500
    tokens[3, 4] = 511
    with torch.no_grad():
        model.model.embed_tokens.weight[511] = torch.inf
    with pytest.raises(SaapError, match=r"layer \d, \S+_proj, sample 3"):
        score(model, tokens, batch_size=2)


@pytest.mark.parametrize(
    ("tokens", "switches"),
    [
        (TOKENS[:, :1], {}),
        (TOKENS[0], {}),
        (TOKENS, {"hessian": "exact"}),
        (TOKENS, {"vector_unit": "layer"}),
    ],
)
def test_tokens_that_predict_nothing_and_unknown_switches_are_refused(tiny_llama, tokens, switches):
    with pytest.raises(SaapError):
        score(tiny_llama(), tokens, **switches)
