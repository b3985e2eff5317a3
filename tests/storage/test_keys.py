import subprocess
import sys

import pytest

from storage.errors import StorageError
from storage.keys import Fingerprints, digest, file_digest


def test_a_key_is_the_same_in_every_process_and_for_every_order_of_a_dict():
    value = {"b": [1, 2.5, None, True], "a": {"y": "ü", "x": (1,)}}
    code = "from storage.keys import digest; print(digest({'a': {'x': [1], 'y': 'ü'}, 'b': [1, 2.5, None, True]}))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == digest(value)


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": 1, "b": None}, {"a": True}])
def test_different_values_have_different_keys(other):
    assert digest({"a": 1}) != digest(other)


def test_what_has_no_canonical_form_is_refused():
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises((ValueError, TypeError)):
            digest(value)


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"a" * (1 << 24))
    fingerprints = Fingerprints(tmp_path / "store")
    first = fingerprints.file(file)
    assert first == file_digest(file)
    memo = next((tmp_path / "store" / "fingerprints").iterdir())
    memo.write_text("f" * 64)
    assert fingerprints.file(file) == "f" * 64  # remembered, not read again
    file.write_bytes(b"b" * (1 << 24))
    assert fingerprints.file(file) == file_digest(file) != first


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match="gone"):
        Fingerprints(tmp_path).file(tmp_path / "gone")
