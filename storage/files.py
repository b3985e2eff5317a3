"""Small files, written whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a text file in UTF-8: a reader finds the old content or the new, and a crash leaves no half.

    Raises OSError; what was written is then removed.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have a file or folder on the disk before going on. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
