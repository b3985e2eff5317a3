"""Two hosts and the places they may share."""

import pytest

from tests.storage.hosts import empty_store


@pytest.fixture
def url(bucket):
    return f"s3://{bucket}/team/store"


@pytest.fixture(params=["s3", "folder"])
def place(request, tmp_path):
    """A URL of either kind."""
    if request.param == "s3":
        return request.getfixturevalue("url")
    (tmp_path / "shared").mkdir()
    return f"file://{tmp_path / 'shared'}"


@pytest.fixture
def stores(tmp_path):
    """Two hosts."""
    return empty_store(tmp_path / "one"), empty_store(tmp_path / "two")
