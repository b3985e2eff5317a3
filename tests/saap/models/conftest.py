"""Fixtures: a model of each family."""

import pytest

from tests.saap.models.families import CASES, LLAMA_LIKE, LLAMAS, build


@pytest.fixture(params=CASES | LLAMAS)
def model(request):
    return build(request.param)


@pytest.fixture(params=LLAMA_LIKE)
def llama_like(request):
    return build(request.param)
