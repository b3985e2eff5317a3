"""Every switch of scoring, fusion, fluctuation and ASI, by the values the configuration offers: what it changes."""

from typing import get_args

import numpy as np
import pytest
import torch

from saap import asi, discover, fluctuation, fuse, score, weight_norms
from tasks import config

SECTIONS = {"score": config.Score, "fuse": config.Fuse, "fluctuation": config.Fluctuation}
SWITCHES = [
    (section, name, value)
    for section, about in SECTIONS.items()
    for name, field in about.model_fields.items()
    for value in get_args(field.annotation)
    if value != field.default
]
# what comes after a switch and may change with it; what is named first must
CHANGES = {
    "hessian": ("vector", "lambda_vector", "fused", "fluctuation", "asi"),
    "vector_unit": ("vector", "lambda_vector", "fused", "fluctuation", "asi"),
    "fusion": ("fused", "lambda_vector", "lambda_element", "fluctuation", "asi"),
    "lambda_scope": ("lambda_vector", "lambda_element", "fused", "fluctuation", "asi"),
    "fluctuation": ("fluctuation", "asi"),
    "asi_scope": ("asi",),
}


def results(model, **switches):
    def of(section):
        return {name: switches[name] for name in SECTIONS[section].model_fields if name in switches}

    tokens = torch.randint(0, 512, (4, 13), generator=torch.Generator().manual_seed(5))
    groups = discover(model)
    vector, element = score(model, tokens, **of("score"))
    fused, lambda_vector, lambda_element = fuse(vector, element, groups, **of("fuse"))
    switch = of("fluctuation")
    scope = {"asi_scope": switch.pop("asi_scope")} if "asi_scope" in switch else {}
    moved = fluctuation(fused, weight_norms(model), **switch)
    return {
        "vector": vector,
        "element": element,
        "lambda_vector": lambda_vector,
        "lambda_element": lambda_element,
        "fused": fused,
        "fluctuation": moved,
        "asi": asi(moved, groups, **scope),
    }


@pytest.fixture(scope="module")
def default(tiny_llama):
    model = tiny_llama(num_hidden_layers=2)
    return model, results(model)


def test_the_defaults_of_the_library_are_those_of_the_configuration(default):
    model, expected = default
    fields = {name: field.default for about in SECTIONS.values() for name, field in about.model_fields.items()}
    for name, found in results(model, **fields).items():
        assert np.array_equal(found, expected[name])


@pytest.mark.parametrize(("section", "name", "value"), SWITCHES)
def test_a_switch_changes_its_own_step_and_nothing_before_or_beside_it(default, section, name, value):
    model, before = default
    after = results(model, **{name: value})
    must, *may = CHANGES[name]
    assert not np.allclose(after[must], before[must], rtol=1e-3)
    for other in before.keys() - {must, *may}:
        assert np.array_equal(after[other], before[other]), other
