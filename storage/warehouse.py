"""The DuckDB side: tables loaded from published Parquet files and run records, and views over them.

Everything in it can be made again from the store. The file never changes: a process that loads something copies it,
changes the copy, and renames it into place, one process at a time. So a killed process leaves the earlier file. Readers
need no lock and keep the file they opened. What was not loaded, for any reason, is found missing by the next comparison
with the disk.
"""

import contextlib
import errno
import fcntl
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb

from storage import runs
from storage.artifacts import FULL, ArtifactStore
from storage.errors import BusyError, StorageError
from storage.files import fsync
from storage.loading import create_tables, follow_disk, follows_disk, sql_type
from storage.locks import held
from storage.tables import SCHEMAS

VERSION = 15  # raise it when a table or view changes: a file of another version is made again from the store
WRITER_WAITS, READER_WAITS = 60.0, 2.0  # seconds, for the process that is loading something
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
log = logging.getLogger("saap.storage")


class Warehouse:
    """`<root>/warehouse.duckdb`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.file = self.root / "warehouse.duckdb"
        self._store = ArtifactStore(self.root)

    def is_empty(self) -> bool:
        """Whether there is nothing to read and nothing to make it from."""
        return not self.file.exists() and not runs.all_runs(self.root)

    def load(self, run_id: str) -> None:
        """Bring one run up to date. Other processes never make it fail: what it could not load, the next call loads."""
        self._try_to_update(run_id)

    def sync(self) -> None:
        """Bring all runs up to date with their records and artifacts, dead runs marked as killed. Like `load`."""
        runs.mark_killed(self.root)
        self._try_to_update(None)

    def rebuild(self) -> int:
        """Make the file again from the store; the old one stays until the new one is whole. Returns the runs."""
        runs.mark_killed(self.root)
        try:
            with self._lock(WRITER_WAITS):
                self._replace(self._make)
        except OSError as error:
            raise _one_line(error, self.root) from error
        return len(runs.all_runs(self.root))

    @contextlib.contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection to a snapshot of the file, brought up to date with the disk first.

        It can read nothing else but the importance Parquet of the store, and write nothing. Raises StorageError when
        there is no warehouse yet and no run to make it of.
        """
        if self.is_empty():
            raise StorageError(
                f"no warehouse in {self.root}: run something first (saap run …), or name another --store"
            )
        with contextlib.suppress(StorageError):  # a store to read only
            runs.mark_killed(self.root)
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(_attached(self.file))
            if connection is None or not follows_disk(connection, self._store):
                stack.close()
                file = stack.enter_context(self._snapshot(usable=connection is not None))
                connection = stack.enter_context(_attached(file))
            if connection is None:
                raise StorageError(f"{self.file} cannot be read")
            self._importance_view(connection)
            # what spills from memory must not go into the current folder; nothing is made before it is needed
            spill = Path(tempfile.gettempdir()) / f"saap-{uuid.uuid4().hex[:8]}.tmp"
            connection.execute(f"set temp_directory = {_quoted(spill)}")
            connection.execute("set enable_external_access = false")
            connection.execute("set python_enable_replacements = false")
            connection.execute("set lock_configuration = true")
            yield connection

    def _lock(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        return held(self.root / "warehouse.lock", "the warehouse", timeout)

    def _try_to_update(self, only: str | None) -> None:
        try:
            with self._lock(WRITER_WAITS):
                self._update(only)
        except BusyError as busy:
            log.warning("%s: what is new is loaded later", busy)
        except OSError as error:
            raise _one_line(error, self.root) from error

    def _update(self, only: str | None) -> None:
        """Under the lock."""
        if only is None:  # of one run there is something new whenever it is asked for
            with _attached(self.file) as connection:
                if connection is not None and follows_disk(connection, self._store):
                    return
        self._replace(lambda fresh: self._change(fresh, only))

    def _replace(self, fill: Callable[[Path], None]) -> None:
        """Fill a new file, and put it in the place of the old one. Under the lock."""
        for leftover in (*self.root.glob(".warehouse-*"), *self.root.glob("warehouse.new*")):  # of killed writers
            leftover.unlink(missing_ok=True)
        fresh = self.root / f".warehouse-{uuid.uuid4().hex[:8]}"
        try:
            fill(fresh)
            fsync(fresh)
            Path(f"{self.file}.wal").unlink(missing_ok=True)  # another program's: it belongs to the old file
            fresh.replace(self.file)
        except duckdb.Error as error:  # a new file has no old faults: a full disk, a limit
            raise StorageError(f"cannot make the warehouse in {self.root}: {str(error).splitlines()[0]}") from error
        finally:
            for leftover in (fresh, Path(f"{fresh}.wal")):
                leftover.unlink(missing_ok=True)

    def _change(self, fresh: Path, only: str | None = None) -> None:
        """Fill `fresh` with the earlier file, brought up to date; if that is of no use, from the store alone."""
        if _copied(self.file, fresh):
            try:
                with duckdb.connect(str(fresh)) as connection:
                    if connection.execute("select max(version) from schema_version").fetchall() == [(VERSION,)]:
                        follow_disk(connection, self._store, only)
                        connection.execute("checkpoint")
                        return
            except duckdb.Error as error:
                log.warning("the warehouse is damaged (%s): made again from the store", str(error).splitlines()[0])
            fresh.unlink()
        self._make(fresh)

    def _make(self, fresh: Path) -> None:
        with duckdb.connect(str(fresh)) as connection:
            create_tables(connection, VERSION)
            follow_disk(connection, self._store)
            connection.execute("checkpoint")

    @contextlib.contextmanager
    def _snapshot(self, usable: bool) -> Iterator[Path]:
        """The file brought up to date; where the store cannot be written, one of our own."""
        try:
            with self._lock(READER_WAITS if usable else WRITER_WAITS):
                self._update(None)
        except BusyError as busy:
            if not usable:
                raise
            log.warning("%s: shown is what it held before", busy)
        except OSError as error:
            if error.errno not in (*_NOT_WRITABLE, *FULL):
                raise _one_line(error, self.root) from error
            with tempfile.TemporaryDirectory(prefix="saap-") as folder:
                fresh = Path(folder) / self.file.name
                self._change(fresh)
                yield fresh
            return
        yield self.file

    def _importance_view(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Over the whole artifacts only: one damaged file must not take the others with it."""
        columns = ", ".join(SCHEMAS["importance"].names)
        keys = sorted(folder.name for folder in self.root.glob("score/[!.]*"))
        files = [
            self._store.path("score", key) / "importance.parquet"
            for key in keys
            if self._store.inspect("score", key)[0]
        ]
        if files:
            listed = ", ".join(map(_quoted, files))
            source = (
                f"select parse_filename(parse_dirpath(filename)) as key, {columns} "
                f"from read_parquet([{listed}], filename = true)"
            )
            connection.execute(f"set allowed_paths = [{listed}]")
        else:
            empty = ", ".join(f"null::{sql_type(f.type)} as {f.name}" for f in SCHEMAS["importance"])
            source = f"select null::varchar as key, {empty} limit 0"
        connection.execute(f"create temp view importance as {source}")


@contextlib.contextmanager
def _attached(file: Path) -> Iterator[duckdb.DuckDBPyConnection | None]:
    """A connection of its own that reads the file; None when that is not there, broken, or of another version."""
    with duckdb.connect() as connection:
        try:
            connection.execute(f"attach {_quoted(file)} as warehouse (read_only)")
            connection.execute("use warehouse")
            rows = connection.execute("select max(version) from schema_version").fetchall()
        except duckdb.Error:
            rows = []
        yield connection if rows == [(VERSION,)] else None


def _copied(file: Path, fresh: Path) -> bool:
    """Copy the file, unless there is none or another program is writing to it."""
    try:
        with file.open("rb") as old, fresh.open("wb") as new:
            fcntl.lockf(old, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the kind of lock that DuckDB takes
            shutil.copyfileobj(old, new, 1 << 20)
        return True
    except (FileNotFoundError, BlockingIOError):
        fresh.unlink(missing_ok=True)
        return False


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _one_line(error: OSError, root: Path) -> OSError:
    return error if isinstance(error, StorageError) else StorageError(f"cannot write to {root} ({error.strerror})")
