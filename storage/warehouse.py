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
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import duckdb

from storage import runs
from storage.artifacts import FULL, ArtifactStore
from storage.damage import move_aside
from storage.database import VERSION, attached, fault_of, is_current, quoted, seal
from storage.errors import BusyError, StorageError
from storage.files import fsync, listed, remove
from storage.hints import in_store
from storage.keys import is_key
from storage.loading import create_tables, follow_disk, follows_disk, sql_type
from storage.locks import held
from storage.tables import SCHEMAS, check_table

WRITER_WAITS, READER_WAITS = 60.0, 2.0  # seconds, for the process that is loading something
# what a query can fail of by itself; a checksum that does not fit is a plain duckdb.Error
_OF_THE_QUERY = (
    *(duckdb.ParserException, duckdb.ConversionException, duckdb.OutOfRangeException, duckdb.PermissionException),
    *(duckdb.OutOfMemoryException, duckdb.InterruptException, duckdb.NotImplementedException),
)
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

        It can read nothing else but the importance Parquet of the store, which `show_importance` adds, and write
        nothing. Raises StorageError when there is no warehouse yet and no run to make it of, and when a query fails of
        something damaged: that is then made again or set aside.
        """
        if self.is_empty():
            raise StorageError(
                f"no warehouse in {self.root}: run something first (saap run …), or name another --store"
            )
        with contextlib.ExitStack() as stack:
            file, connection = self.file, stack.enter_context(attached(self.file))
            if connection is None or not self._is_up_to_date(connection):
                stack.close()
                with contextlib.suppress(StorageError):  # a store to read only
                    runs.mark_killed(self.root)
                file = stack.enter_context(self._snapshot(usable=connection is not None))
                connection = stack.enter_context(attached(file))
            if connection is None:
                raise StorageError(f"{self.file} cannot be read")
            connection.execute(f"set allowed_paths = [{', '.join(map(quoted, self._scored()))}]")
            # what spills from memory must not go into the current folder; nothing is made before it is needed
            spill = Path(tempfile.gettempdir()) / f"saap-{uuid.uuid4().hex[:8]}.tmp"
            connection.execute(f"set temp_directory = {quoted(spill)}")
            connection.execute("set enable_external_access = false")
            connection.execute("set python_enable_replacements = false")
            connection.execute("set lock_configuration = true")
            try:
                yield connection
            except duckdb.Error as error:
                if remedy := self._mended(error, file):
                    raise StorageError(remedy) from error
                raise

    def show_importance(self, connection: duckdb.DuckDBPyConnection, keys: Collection[str] | None = None) -> None:
        """Add the view `importance` to a connection: of all scores, or of those with these keys.

        It is over the whole artifacts only, each of which is compared with its manifest now: one damaged file must not
        take the others with it.
        """
        columns = ", ".join(SCHEMAS["importance"].names)
        ((allowed,),) = connection.execute("select current_setting('allowed_paths')").fetchall()
        files = self._whole(file for file in sorted(map(Path, allowed)) if keys is None or file.parent.name in keys)
        if files:
            source = (
                f"select parse_filename(parse_dirpath(filename)) as key, {columns} "
                f"from read_parquet([{', '.join(map(quoted, files))}], filename = true)"
            )
        else:
            empty = ", ".join(f"null::{sql_type(f.type)} as {f.name}" for f in SCHEMAS["importance"])
            source = f"select null::varchar as key, {empty} limit 0"
        connection.execute(f"create or replace temp view importance as {source}")

    def _is_up_to_date(self, connection: duckdb.DuckDBPyConnection) -> bool:
        """Whether the tables hold what the disk holds, and no run that they call running has died."""
        if not follows_disk(connection, self._store):
            return False
        running = connection.execute("select run_id from runs where status = 'running'").fetchall()
        if all(runs.is_alive(self.root, run_id) for (run_id,) in running):
            return True
        with contextlib.suppress(StorageError):  # a store to read only
            return not runs.mark_killed(self.root)
        return True

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
            with attached(self.file) as connection:
                if connection is not None and follows_disk(connection, self._store):
                    return
        self._replace(lambda fresh: self._change(fresh, only))

    def _replace(self, fill: Callable[[Path], None]) -> None:
        """Fill a new file, and put it in the place of the old one. Under the lock."""
        for leftover in (*self.root.glob(".warehouse-*"), *self.root.glob("warehouse.new*")):  # of killed writers
            remove(leftover)
        fresh = self.root / f".warehouse-{uuid.uuid4().hex[:8]}"
        try:
            fill(fresh)
            seal(fresh)
            fsync(fresh)
            remove(Path(f"{self.file}.wal"))  # another program's: it belongs to the old file
            if self.file.is_dir() and not self.file.is_symlink():
                move_aside(self.root, self.file, self.file.name, f"the warehouse {self.file}", "it is a folder")
            fresh.replace(self.file)
        except duckdb.Error as error:  # a new file has no old faults: a full disk, a limit
            raise StorageError(f"cannot make the warehouse in {self.root}: {str(error).splitlines()[0]}") from error
        finally:
            for leftover in (fresh, Path(f"{fresh}.wal")):
                remove(leftover)

    def _change(self, fresh: Path, only: str | None = None) -> None:
        """Fill `fresh` with the earlier file, brought up to date; if that is of no use, from the store alone."""
        if _copied(self.file, fresh):
            try:
                with duckdb.connect(str(fresh)) as connection:
                    if is_current(connection, fresh):
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
                seal(fresh)
                yield fresh
            return
        yield self.file

    def _scored(self) -> list[Path]:
        """The importance files of all artifacts, whole or not."""
        folder = self.root / "score"
        return [folder / key / "importance.parquet" for key in sorted(listed(folder)) if is_key(key)]

    def _whole(self, files: Iterable[Path], *, verify: bool = False) -> list[Path]:
        """Those importance files whose artifact is whole; a damaged one is set aside, as one that a run meets."""
        whole = []
        for file in files:
            key = file.parent.name
            if self._store.find("score", key, verify=verify) is None:
                continue
            try:
                check_table(file.parent, "importance")  # large files are compared by size alone
                whole.append(file)
            except StorageError as fault:
                self._store.set_aside("score", key, str(fault))
        return whole

    def _mended(self, error: duckdb.Error, file: Path) -> str | None:
        """Whether a query failed of something damaged: what to tell of it, or None. It is made again or set aside."""
        if isinstance(error, _OF_THE_QUERY):
            return None
        names_something = isinstance(error, duckdb.BinderException | duckdb.CatalogException)
        if fault := fault_of(file, read_all=not names_something):
            try:
                self.rebuild()
            except OSError as unable:
                return f"{self.file} is damaged ({fault}) and cannot be made again: {unable}"
            return f"{self.file} was damaged ({fault}) and has been made again: give the command again"
        if names_something:
            return None
        lost = {*self._whole(self._scored())} - {*self._whole(self._scored(), verify=True)}
        for file in sorted(lost):
            if file.exists():
                verify = f"saap verify {in_store(self.root)}"
                return f"{file} is damaged, and cannot be set aside in a store that cannot be written: {verify}"
            return f"{file} was damaged and is set aside: give the command again"
        return None


def _copied(file: Path, fresh: Path) -> bool:
    """Copy the file, unless there is none, it is not ours to read, or another program is writing to it."""
    if not file.is_file():
        return False
    try:
        with file.open("rb") as old, fresh.open("wb") as new:
            fcntl.lockf(old, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the kind of lock that DuckDB takes
            shutil.copyfileobj(old, new, 1 << 20)
        return True
    except (FileNotFoundError, BlockingIOError, PermissionError):
        fresh.unlink(missing_ok=True)
        return False


def _one_line(error: OSError, root: Path) -> OSError:
    return (
        error
        if isinstance(error, StorageError)
        else StorageError(f"cannot write to {error.filename or root} ({error.strerror})")
    )
