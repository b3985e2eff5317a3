import math

import numpy as np
import pytest

from saap import SaapError, asi, fluctuation
from tests.saap.pruning.test_plan import make_groups

LAYERS, HEADS, CHANNELS, SAMPLES = 3, 4, 6, 5
GROUPS = make_groups(LAYERS, HEADS, CHANNELS)
SCOPES = {
    "layer_kind": lambda i: (GROUPS.layer[i], GROUPS.kind[i]),
    "kind": lambda i: GROUPS.kind[i],
    "global": lambda i: 0,
}


def slow(column, norm, option):
    mean = math.fsum(column) / len(column)
    variance = math.fsum((x - mean) ** 2 for x in column) / (len(column) - 1)
    return {"var_weight": variance * norm, "var": variance, "cv": math.sqrt(variance) / abs(mean), "mean": mean}[option]


@pytest.mark.parametrize("option", ["var_weight", "var", "cv", "mean"])
def test_fluctuation_equals_a_slow_loop(option):
    rng = np.random.default_rng(0)
    fused, norms = rng.normal(-2, 3, (SAMPLES, len(GROUPS))), rng.gamma(2, 5, len(GROUPS))
    found = fluctuation(fused, norms, fluctuation=option)
    expected = [slow(fused[:, i].tolist(), norms[i], option) for i in range(len(GROUPS))]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_asi_standardises_each_scope(scope):
    values = np.random.default_rng(1).gamma(0.5, 1e-6, len(GROUPS))
    found = asi(values, GROUPS, asi_scope=scope)
    for i, value in enumerate(values):
        members = [values[j] for j in range(len(GROUPS)) if SCOPES[scope](j) == SCOPES[scope](i)]
        mean = math.fsum(members) / len(members)
        std = math.sqrt(math.fsum((m - mean) ** 2 for m in members) / len(members))
        assert found[i] == pytest.approx((value - mean) / std, rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1e-9, 12345.678])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_of_equal_values_scores_zero(scope, constant):
    values = np.full(len(GROUPS), constant)
    assert (asi(values, GROUPS, asi_scope=scope) == 0).all()


def test_an_importance_that_is_zero_throughout_does_not_fluctuate():
    fused = np.random.default_rng(2).random((SAMPLES, len(GROUPS)))
    fused[:, 3] = 0
    for option in ("var_weight", "var", "cv"):
        found = fluctuation(fused, np.ones(len(GROUPS)), fluctuation=option)
        assert found[3] == 0
        assert (np.delete(found, 3) > 0).all()


@pytest.mark.parametrize("option", ["var_weight", "var", "cv"])
def test_one_sample_has_no_fluctuation(option):
    with pytest.raises(SaapError, match="two calibration samples"):
        fluctuation(np.ones((1, len(GROUPS))), np.ones(len(GROUPS)), fluctuation=option)


def test_the_mean_needs_only_one_sample():
    fused = np.arange(float(len(GROUPS)))[None]
    assert fluctuation(fused, np.ones(len(GROUPS)), fluctuation="mean").tolist() == fused[0].tolist()


def test_unknown_switches_are_refused():
    with pytest.raises(SaapError):
        fluctuation(np.ones((2, len(GROUPS))), np.ones(len(GROUPS)), fluctuation="range")
    with pytest.raises(SaapError):
        asi(np.ones(len(GROUPS)), GROUPS, asi_scope="layer")
