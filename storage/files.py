"""Small files, written whole or not at all."""

import errno
import os
import shutil
import uuid
from pathlib import Path

from storage.errors import StorageError


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


# errors that say nothing of the file: too many are open, memory is short, a network file system lost its server
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}


def read_small(file: Path) -> bytes:
    """The content of a file that is one: not a folder, a pipe that nobody writes to, or a link in a circle.

    Raises FileNotFoundError when nothing is there, StorageError for anything else; it has a cause where that is no
    fault of the file.
    """
    try:
        if file.is_file():
            return file.read_bytes()
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise StorageError(f"cannot read {file} ({error.strerror})") from error
    except (OSError, ValueError) as error:
        passing = isinstance(error, OSError) and error.errno in PASSING
        raise StorageError(f"it cannot be read: {error}") from (error if passing else None)
    if os.path.lexists(file):
        raise StorageError("it is no regular file")
    raise FileNotFoundError(file)


def listed(folder: Path) -> list[str]:
    """The names in a folder; none when it is not there. Raises PermissionError: what may not be seen is not absent."""
    try:
        return os.listdir(folder)
    except PermissionError:
        raise
    except OSError:
        return []


def fsync(path: Path) -> None:
    """Have a file or folder on the disk before going on. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Whatever lies there: a file, a link, a folder with all in it, or nothing. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
