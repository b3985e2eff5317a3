"""The DuckDB side: tables loaded from published Parquet files and run records, and views over them.

Nothing lives only here: `rebuild` makes the same file again from the store. One process at a time opens the file, under
an OS lock; DuckDB's own lock refuses a second process instead of making it wait, and retrying on it can lose rows.
"""

import contextlib
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from filelock import FileLock

from storage import runs
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.tables import SCHEMAS

VERSION = 13  # raise it when a table or view changes: a file of another version is rebuilt from the store

# stage → the tables loaded from its artifact
STAGE_TABLES = {
    "fluctuation": ("groups",),
    "rank": ("groups",),
    "prune": ("widths",),
    "recover": ("training",),
    "evaluate": ("metrics", "items"),
    "speed": ("speed",),
}
# what a row belongs to, where that is not (run_id, key): the variant of a metric comes from the stage run, since it is
# measured on one checkpoint whatever that is called; items are many, and the same for all runs that share the artifact
_OWNERS = {"metrics": ("run_id", "key", "variant"), "items": ("key",)}
_SQL_TYPES = {"int32": "INTEGER", "int64": "BIGINT", "double": "DOUBLE", "float": "FLOAT", "bool": "BOOLEAN"}

_TABLES = """
create table schema_version (version integer);
create table runs (
    run_id varchar primary key, name varchar, model varchar, data varchar, criterion varchar, ratio double,
    started_at timestamp, finished_at timestamp, status varchar, error varchar, config varchar);
create table stage_runs (
    run_id varchar, position integer, stage varchar, variant varchar, benchmark varchar, key varchar, cached boolean,
    seconds double, finished_at timestamp, skipped varchar, primary key (run_id, position));
create table published_results (
    source varchar, "table" varchar, model varchar, ratio double, tuned boolean, method varchar, benchmark varchar,
    value double, misprint boolean, note varchar);
"""


class Warehouse:
    """`<root>/warehouse.duckdb`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.file = self.root / "warehouse.duckdb"

    def load(self, run_id: str) -> None:
        """Bring one run up to date: its row, and every recorded stage not there yet. Twice is once."""
        with self._lock():
            if self._stale():
                self._rebuild()
                return
            with duckdb.connect(str(self.file)) as connection:
                self._load(connection, run_id)
                self._importance_view(connection)

    def rebuild(self) -> int:
        """Make the file again from the store; the old one stays until the new one is whole. Returns the runs."""
        with self._lock():
            return self._rebuild()

    @contextlib.contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-only connection; the file is rebuilt first if it is broken or of another version.

        Raises StorageError when there is no warehouse yet.
        """
        if not self.file.exists():
            raise StorageError(
                f"no warehouse in {self.root}: run something first (saap run …), or name another --store"
            )
        with self._lock():
            if self._stale():
                self._rebuild()
            with duckdb.connect(str(self.file), read_only=True) as connection:
                yield connection

    def _lock(self) -> FileLock:
        return FileLock(self.root / "warehouse.lock")

    def _stale(self) -> bool:
        if not self.file.exists():
            return True
        try:
            with duckdb.connect(str(self.file), read_only=True) as connection:
                row = connection.execute("select max(version) from schema_version").fetchone()
            return row is None or row[0] != VERSION
        except duckdb.Error:
            return True

    def _rebuild(self) -> int:
        fresh = self.file.with_suffix(".new")
        for leftover in (fresh, Path(f"{fresh}.wal")):
            leftover.unlink(missing_ok=True)
        known = runs.all_runs(self.root)
        with duckdb.connect(str(fresh)) as connection:
            connection.execute(_TABLES)
            for table in dict.fromkeys(table for tables in STAGE_TABLES.values() for table in tables):
                connection.execute(_create(table))
            connection.execute(files("storage").joinpath("views.sql").read_text())
            with as_file(files("storage").joinpath("published_results.csv")) as published:
                connection.execute("insert into published_results from read_csv(?, header = true)", [str(published)])
            connection.execute("insert into schema_version values (?)", [VERSION])
            for run_id in known:
                self._load(connection, run_id)
            self._importance_view(connection)
        Path(f"{self.file}.wal").unlink(missing_ok=True)
        fresh.replace(self.file)
        return len(known)

    def _load(self, connection: duckdb.DuckDBPyConnection, run_id: str) -> None:
        run = runs.read_run(self.root, run_id)
        connection.begin()
        try:
            connection.execute(
                "insert or replace into runs values (?, ?, ?, ?, ?, ?, make_timestamp(?), make_timestamp(?), ?, ?, ?)",
                [
                    *(run[c] for c in ("run_id", "name", "model", "data", "criterion", "ratio")),
                    _microseconds(run["started_at"]),
                    _microseconds(run["finished_at"]),
                    run["status"],
                    run.get("error"),
                    run["config"],
                ],
            )
            there = connection.execute("select position from stage_runs where run_id = ?", [run_id]).fetchall()
            done = {row[0] for row in there}
            for stage in runs.read_stages(self.root, run_id):
                if stage["position"] not in done:
                    self._load_stage(connection, run_id, stage)
            connection.commit()
        except BaseException:
            connection.rollback()
            raise

    def _load_stage(self, connection: duckdb.DuckDBPyConnection, run_id: str, stage: dict[str, Any]) -> None:
        connection.execute(
            "insert into stage_runs values (?, ?, ?, ?, ?, ?, ?, ?, make_timestamp(?), ?)",
            [
                run_id,
                *(stage[c] for c in ("position", "stage", "variant", "benchmark", "key", "cached", "seconds")),
                _microseconds(stage["at"]),
                stage.get("skipped"),
            ],
        )
        for table in STAGE_TABLES.get(stage["stage"], ()):
            file = self.root / stage["stage"] / stage["key"] / f"{table}.parquet"
            if not file.exists():
                continue  # the artifact was removed after the run: its record stays, its rows are gone
            owner = {"run_id": run_id, "key": stage["key"], "variant": stage["variant"]}
            owned = _OWNERS.get(table, ("run_id", "key"))
            if (
                owned == ("key",)
                and connection.execute(f"from {table} where key = ? limit 1", [stage["key"]]).fetchone()
            ):
                continue  # loaded with an earlier run
            leading = ", ".join(f"? as {name}" for name in owned)
            # by name: files written before a column was added have no such column
            connection.execute(
                f"insert into {table} by name select {leading}, * from read_parquet(?)",
                [*(owner[name] for name in owned), str(file)],
            )

    def _importance_view(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Over the whole artifacts only: one damaged file must not take the others with it."""
        store = ArtifactStore(self.root)
        columns = ", ".join(SCHEMAS["importance"].names)
        keys = sorted(folder.name for folder in self.root.glob("score/[!.]*"))
        files = [store.path("score", key) / "importance.parquet" for key in keys if store.inspect("score", key)[0]]
        if files:
            listed = ", ".join(f"'{_quoted(file)}'" for file in files)
            source = (
                f"select parse_filename(parse_dirpath(filename)) as key, {columns} "
                f"from read_parquet([{listed}], filename = true)"
            )
        else:
            empty = ", ".join(f"null::{_sql_type(f.type)} as {f.name}" for f in SCHEMAS["importance"])
            source = f"select null::varchar as key, {empty} limit 0"
        connection.execute(f"create or replace view importance as {source}")


def _create(table: str) -> str:
    columns = [f"{name} varchar" for name in _OWNERS.get(table, ("run_id", "key"))]
    columns += [f"{field.name} {_sql_type(field.type)}" for field in SCHEMAS[table]]
    return f"create table {table} ({', '.join(columns)})"


def _sql_type(kind: pa.DataType) -> str:
    return _SQL_TYPES.get(str(kind), "VARCHAR")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e6)
