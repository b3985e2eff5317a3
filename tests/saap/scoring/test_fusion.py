import math

import numpy as np
import pytest
from scipy.optimize import minimize

from saap import SaapError, fluctuation, fuse
from saap.scoring.fusion import LAMBDA_SCOPES
from tests.saap.pruning.test_plan import make_groups

LAYERS, HEADS, CHANNELS, SAMPLES = 3, 2, 5, 7
GROUPS = make_groups(LAYERS, HEADS, CHANNELS)
SCOPES = {
    "kind": lambda i: GROUPS.kind[i],
    "layer_kind": lambda i: (GROUPS.layer[i], GROUPS.kind[i]),
    "global": lambda i: 0,
    "group": lambda i: i,
}


def importances(seed=0):
    rng = np.random.default_rng(seed)
    shape = (SAMPLES, len(GROUPS))
    return (rng.gamma(2, 3e-4, shape).astype(np.float32), rng.gamma(2, 20, shape).astype(np.float32))


@pytest.mark.parametrize("scope", SCOPES)
def test_lambdas_minimise_the_summed_uncertainty_objective(scope):
    vector, element = importances()
    _, lambda1, lambda2 = fuse(vector, element, GROUPS, lambda_scope=scope)
    for label in {SCOPES[scope](i) for i in range(len(GROUPS))}:
        members = [i for i in range(len(GROUPS)) if SCOPES[scope](i) == label]
        v, e = vector[:, members].astype(float), element[:, members].astype(float)

        def objective(x, v=v, e=e):
            return (v / (2 * math.exp(2 * x[0])) + e / (2 * math.exp(2 * x[1])) + x[0] + x[1]).mean()

        best = minimize(objective, [math.log(v.max()), math.log(e.max())], method="Nelder-Mead",
                        options={"xatol": 1e-7, "fatol": 1e-14, "maxiter": 5000})  # fmt: skip
        np.testing.assert_allclose(lambda1[members], math.exp(best.x[0]), rtol=1e-5)
        np.testing.assert_allclose(lambda2[members], math.exp(best.x[1]), rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_adaptive_fusion_equals_a_slow_loop(scope):
    vector, element = importances(1)
    fused, _, _ = fuse(vector, element, GROUPS, lambda_scope=scope)
    assert fused.dtype == np.float64
    for i in range(len(GROUPS)):
        members = [j for j in range(len(GROUPS)) if SCOPES[scope](j) == SCOPES[scope](i)]
        square1 = math.fsum(vector[:, members].ravel().tolist()) / (SAMPLES * len(members))
        square2 = math.fsum(element[:, members].ravel().tolist()) / (SAMPLES * len(members))
        for d in range(SAMPLES):
            expected = float(vector[d, i]) / (2 * square1) + float(element[d, i]) / (2 * square2)
            expected += math.log(math.sqrt(square1) * math.sqrt(square2))
            assert fused[d, i] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("fusion", "share"), [("vector", 1.0), ("element", 0.0), ("weighted", 0.5)])
def test_the_other_fusions_are_fixed_mixtures_without_lambdas(fusion, share):
    vector, element = importances(2)
    fused, lambda1, lambda2 = fuse(vector, element, GROUPS, fusion=fusion)
    expected = [[share * float(v) + (1 - share) * float(e) for v, e in zip(*rows, strict=True)]
                for rows in zip(vector, element, strict=True)]  # fmt: skip
    np.testing.assert_allclose(fused, expected, rtol=1e-12)
    assert (lambda1 == 1).all()
    assert (lambda2 == 1).all()


@pytest.mark.parametrize("zeroed", [0, 1], ids=["vector", "element"])
def test_a_scope_without_any_importance_is_an_error_that_names_it(zeroed):
    pair = importances()
    pair[zeroed][:, (GROUPS.layer == 1) & (GROUPS.kind == "mlp")] = 0
    with pytest.raises(SaapError, match=r"layer 1, mlp 0 .*layer_kind"):
        fuse(*pair, GROUPS, lambda_scope="layer_kind")
    assert np.isfinite(fuse(*pair, GROUPS, lambda_scope="kind")[0]).all()


@pytest.mark.parametrize("zeroed", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("scope", LAMBDA_SCOPES)
def test_importances_that_are_all_zero_are_not_sent_to_a_wider_scope(zeroed, scope):
    pair = importances()
    for one in zeroed:
        pair[one][:] = 0
    with pytest.raises(SaapError, match=r"^all importances are zero: the model, or the text .* is degenerate$"):
        fuse(*pair, GROUPS, lambda_scope=scope)


@pytest.mark.parametrize("switch", [{"fusion": "separate"}, {"lambda_scope": "layer"}])
def test_unknown_switches_are_refused(switch):
    with pytest.raises(SaapError):
        fuse(*importances(), GROUPS, **switch)


def test_sample_by_sample_gives_the_bits_of_all_at_once():
    rng = np.random.default_rng(3)
    groups = make_groups(40, 8, 500)
    vector, element = rng.lognormal(-6, 3, (2, 50, len(groups))).astype(np.float32)
    v, e = vector.astype(float), element.astype(float)
    fused, lambda1, lambda2 = fuse(vector, element, groups, lambda_scope="layer_kind")
    scope = groups.scopes("layer_kind")
    size = np.bincount(scope)
    square1, square2 = ((np.bincount(scope, x.mean(0)) / size)[scope] for x in (v, e))
    assert np.array_equal(fused, v / (2 * square1) + e / (2 * square2) + 0.5 * np.log(square1 * square2))
    assert np.array_equal(lambda1**2, np.sqrt(square1) ** 2)
    assert np.array_equal(lambda2**2, np.sqrt(square2) ** 2)
    assert np.array_equal(fuse(vector, element, groups, fusion="weighted")[0], 0.5 * v + 0.5 * e)
    assert np.array_equal(fluctuation(fused, np.ones(len(groups))), fused.var(0, ddof=1))
    assert np.array_equal(fluctuation(fused, lambda1, fluctuation="mean"), fused.mean(0))
