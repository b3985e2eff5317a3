"""The paper's scores of heads, experts and channels of experts against the gradients of all weights."""

import copy

import numpy as np
import pytest

from saap import score, weight_norms
from tests.saap.models.families import IDS
from tests.saap.models.mixtures import CASES, WIDTH, E, build, mixed, router_and_experts


def assert_close(found, expected):
    """To 2e-4, or a millionth of the largest score: of a router that is sure the gradient cancels."""
    for mine, plain in zip(found, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, plain, rtol=2e-4, atol=1e-6 * plain.max())


def slices(layer, heads, of):
    """The tensors of each group of a layer, rows or columns as lists of vectors; `of` gives a parameter's salience."""
    attention = layer.self_attn
    q, k, v, o = (of(getattr(attention, f"{name}_proj").weight) for name in "qkvo")
    for head in range(heads):
        rows = [*np.split(q, heads)[head], *np.split(k, heads)[head], *np.split(v, heads)[head]]
        yield [*rows, *np.split(o.T, heads)[head]]
    if not mixed(layer):
        gate, up, down = (of(getattr(layer.mlp, f"{name}_proj").weight) for name in ("gate", "up", "down"))
        for channel in range(len(gate)):
            yield [gate[channel], up[channel], down[:, channel]]
        return
    router, experts = router_and_experts(layer)
    rows, both, down = (of(tensor) for tensor in (router.weight, experts.gate_up_proj, experts.down_proj))
    channels = []
    for e in range(E):
        if hasattr(experts, "down_proj_bias"):
            channels.append([[both[e][:, 2 * j], both[e][:, 2 * j + 1], down[e][j]] for j in range(WIDTH)])
        else:
            channels.append([[both[e][j], both[e][WIDTH + j], down[e][:, j]] for j in range(WIDTH)])
    for e in range(E):
        yield [rows[e], *(vector for channel in channels[e] for vector in channel)]
    for own in channels:
        yield from own


def plain_scores(model, hessian, vector_unit):
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    vectors, elements = [], []
    for ids in IDS[:, None]:
        exact.zero_grad()
        exact(ids, labels=ids).loss.backward()
        vector, element = [], []
        for layer in exact.model.layers:
            for group in slices(layer, 2, lambda w: (w * w.grad).detach().numpy()):
                second = [s - 0.5 * s**2 for s in group]
                sums = [s.sum() for s in (second if hessian == "fisher" else group)]
                vector.append(np.abs(sums).sum() if vector_unit == "row" else abs(sum(sums)))
                element.append(sum(np.abs(s).sum() for s in second))
        vectors.append(vector)
        elements.append(element)
    return np.array(vectors), np.array(elements)


@pytest.mark.parametrize(("hessian", "vector_unit"), [("none", "row"), ("fisher", "row"), ("none", "group")])
@pytest.mark.parametrize("case", CASES)
def test_scores_of_experts_equal_plain_autograd(case, hessian, vector_unit):
    model = build(case)
    expected = plain_scores(model, hessian, vector_unit)
    for batch_size in (1, 3):
        assert_close(score(model, IDS, hessian=hessian, vector_unit=vector_unit, batch_size=batch_size), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_norm_of_a_group_is_that_of_all_its_weights(case):
    model = build(case)
    found = [
        sum(np.square(vector).sum() for vector in group)
        for layer in model.model.layers
        for group in slices(layer, 2, lambda w: w.detach().double().numpy())
    ]
    np.testing.assert_allclose(weight_norms(model), found, rtol=1e-5)
