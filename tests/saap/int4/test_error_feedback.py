"""Codes with error feedback, against the optimal brain surgeon's own update in float64, one input after another."""

import numpy as np
import pytest
import torch

from saap import SaapError, dequantize, prune, quantize, quantize_with_feedback, to_groupwise
from saap.int4 import error_feedback
from tests.saap.models.families import build, random_keep

TOKENS = torch.randint(3, 120, (6, 24), generator=torch.Generator().manual_seed(7))


def correlated(width, seed=0, count=400):
    """Inputs as a layer sees them, each with something of the others: (count, width)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ (np.eye(width) + 0.3 * rng.normal(size=(width, width)))


def values(codes, scale, zero, group_size):
    group = np.arange(codes.shape[1]) // group_size
    return codes.numpy() * scale.numpy().astype(float)[:, group] + zero.numpy().astype(float)[:, group]


def surgeon(weight, gram, group_size, levels, damping=0.01):
    """Each input is fixed to its code in turn, and the rest moves to the optimum that is left (Hassibi & Stork 1993).

    The inverse of what is left comes from eliminating the input from the whole inverse; GPTQ's Cholesky factor holds
    the same numbers.
    """
    left, codes = weight.astype(float).copy(), np.zeros(weight.shape, np.uint8)
    inverse = np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))
    for i in range(weight.shape[1]):
        if i % group_size == 0:
            part = left[:, i : i + group_size]
            low, high = part.min(1), part.max(1)
            a, b = ((high - low) / levels).astype(np.float16).astype(float), low.astype(np.float16).astype(float)
        codes[:, i] = np.clip(np.rint((left[:, i] - b) / np.where(a > 0, a, 1)), 0, levels)
        error = left[:, i] - (a * codes[:, i] + b)
        left[:, i:] -= error[:, None] * inverse[i, i:] / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize(("width", "group_size", "bits"), [(64, 16, 4), (50, 16, 4), (33, 32, 3), (7, 5, 2)])
def test_codes_are_the_surgeons(monkeypatch, width, group_size, bits):
    monkeypatch.setattr(error_feedback, "SHRINK", (1.0,))
    x, weight = correlated(width), np.random.default_rng(1).normal(size=(40, width)).astype(np.float32)
    codes, scale, zero = quantize_with_feedback(torch.from_numpy(weight), torch.from_numpy(x.T @ x), group_size, bits)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.float16)
    expected = surgeon(weight, x.T @ x, group_size, 2**bits - 1)
    rows = (codes.numpy() == expected).all(1)
    assert rows.mean() > 0.9  # a value between two codes may fall to either, and moves what comes after it


@pytest.mark.parametrize("bits", [3, 4])
def test_the_output_is_nearer_than_with_the_nearest_codes(bits):
    x, weight = correlated(96), np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    tensor, gram = torch.from_numpy(weight), torch.from_numpy(x.T @ x)
    errors = {
        name: np.square((values(*found, 32) - weight) @ x.T).sum()
        for name, found in {
            "nearest": quantize(tensor, 32, bits),
            "feedback": quantize_with_feedback(tensor, gram, 32, bits),
        }.items()
    }
    assert errors["feedback"] < 0.6 * errors["nearest"]


def test_inputs_that_have_nothing_in_common_leave_the_nearest_codes(monkeypatch):
    monkeypatch.setattr(error_feedback, "SHRINK", (1.0,))
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for mine, nearest in zip(quantize_with_feedback(weight, torch.eye(64), 32), quantize(weight, 32), strict=True):
        assert torch.equal(mine, nearest)


def test_inputs_that_are_always_zero_and_constant_groups_do_no_harm():
    x = correlated(64)
    x[:, 10] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[2, :32] = 0.25
    found = quantize_with_feedback(weight, torch.from_numpy(x.T @ x), 32)
    assert np.isfinite(values(*found, 32)).all()
    assert np.abs(values(*found, 32)[2, 0] - 0.25) < 0.01


@pytest.mark.parametrize(("place", "value"), [("weight", np.nan), ("weight", 1e6), ("gram", np.inf), ("gram", np.nan)])
def test_what_is_not_finite_or_too_large_is_refused(place, value):
    x = correlated(32)
    given = {"weight": torch.ones(4, 32), "gram": torch.from_numpy(x.T @ x)}
    given[place][1, 3] = value
    with pytest.raises(SaapError, match=r"float16|finite"):
        quantize_with_feedback(given["weight"], given["gram"], 16)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "phi3", "granite", "qwen3_5"])
@pytest.mark.parametrize("form", [{"group_size": 16}, {"group_size": None, "groups": 3, "bits": 5}], ids=str)
def test_a_pruned_model_in_such_codes_is_nearer_to_the_float_one(case, form):
    model = build(case)
    small = prune(model, random_keep(model)).float()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with torch.no_grad():
        exact = small(TOKENS).logits
        apart = {
            name: float((dequantize(to_groupwise(small, tokens=tokens, **form))(TOKENS).logits - exact).norm())
            for name, tokens in {"nearest": None, "feedback": TOKENS}.items()
        }
    assert apart["feedback"] < 0.9 * apart["nearest"]
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_the_model_is_used_up_where_that_is_asked(tiny_llama):
    model = tiny_llama()
    count = sum(p.numel() for p in model.parameters())
    kept = to_groupwise(tiny_llama(), tokens=TOKENS)
    small = to_groupwise(model, tokens=TOKENS, consume=True)
    assert sum(p.numel() for p in model.parameters()) < count / 2
    assert all(torch.equal(t, kept.state_dict()[name]) for name, t in small.state_dict().items())
