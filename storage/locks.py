"""Waiting for another process: for a limited time, with a line that says for which one."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from storage.errors import BusyError, StorageError

PATIENCE = 2.0  # seconds of waiting before a line says for whom
log = logging.getLogger("saap.storage")


@contextlib.contextmanager
def held(path: Path, what: str, timeout: float) -> Iterator[None]:
    """Hold the lock file; the kernel frees it when the process dies. A negative timeout (seconds) waits for ever.

    Raises BusyError when another process keeps it longer, StorageError when its folder is gone, OSError
    when it cannot be written.
    """
    if not path.parent.is_dir():  # FileLock would make it, and a store that was removed with it
        raise StorageError(f"the store is gone: there is no folder {path.parent}")
    lock = FileLock(path)
    try:
        first = PATIENCE if timeout < 0 else min(PATIENCE, timeout)
        try:
            lock.acquire(timeout=first)
        except Timeout:
            if timeout == first:
                raise
            log.warning("waiting for %s, held by %s", what, holder(path))
            lock.acquire(timeout=timeout if timeout < 0 else timeout - first)
    except Timeout as error:
        raise BusyError(f"{what} was not free for {timeout:.0f} s, now it is held by {holder(path)}") from error
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file now. An unreadable or absent one is held by nobody."""
    if not path.exists():  # FileLock would make it
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def holder(path: Path) -> str:
    """'process 123 (saap run x.toml)' for the process that holds the lock file, as far as Linux tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(os.stat(path).st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "->" not in fields and fields[5].rpartition(":")[2] == inode:
                words = Path(f"/proc/{int(fields[4])}/cmdline").read_bytes().split(b"\0")
                command = b" ".join(words).decode(errors="replace").strip()
                return f"process {fields[4]} ({command[:120]})"
    return "another process"
