"""The same columns are asked for before a run starts and by the library."""

import pytest

from saap import ACCURACY
from tasks.data import DATA, check_columns, data_file


@pytest.mark.parametrize("benchmark", sorted(ACCURACY))
def test_the_columns_checked_first_are_those_the_library_needs(benchmark):
    assert DATA[benchmark].columns == ACCURACY[benchmark].columns


@pytest.mark.parametrize("role", sorted(DATA))
def test_the_mini_pack_has_every_role_with_its_columns(role):
    check_columns(data_file("mini", role), role)
