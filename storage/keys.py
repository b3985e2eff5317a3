"""Content keys: the same inputs give the same key in every process, on every machine."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import StorageError
from storage.files import write_whole

KEY = "[0-9a-f]{20}"  # the form of all keys, a pattern


def digest(value: Any) -> str:
    """20 hex digits of the canonical JSON of plain data (str, int, float, bool, None, list, tuple, dict)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def is_key(name: str) -> bool:
    """Whether a name has the form of a key. A folder of another name is no artifact of ours."""
    return re.fullmatch(KEY, name) is not None


def file_digest(path: Path) -> str:
    """sha256 of a file's content, hex. Raises StorageError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


class Fingerprints:
    """File digests, remembered in the store by path, size, modification time and inode: gigabytes are hashed once.

    With look_only nothing is written. looked_at: path → [size, modification time in ns] of each file when it was asked
    for.
    """

    def __init__(self, store: Path, *, look_only: bool = False) -> None:
        self._folder = store / "fingerprints"
        self.look_only = look_only
        self.looked_at: dict[str, list[int]] = {}

    def file(self, path: Path) -> str:
        try:
            stat = path.stat()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        self.looked_at[str(path)] = [stat.st_size, stat.st_mtime_ns]
        if stat.st_size < 1 << 24:
            return file_digest(path)
        memo = self._folder / digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
        try:
            known = memo.read_text()
            if len(known) == 64:
                return known
        except OSError:
            pass
        found = file_digest(path)
        if self.look_only:
            return found
        with contextlib.suppress(OSError):  # a store we cannot write to only costs hashing again
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(memo, found)
        return found

    def files(self, paths: Mapping[str, Path]) -> str:
        """One digest of several files, by name and content."""
        return digest({name: self.file(path) for name, path in paths.items()})
