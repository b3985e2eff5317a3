"""How the warehouse follows the disk.

What each part of a run was loaded from is remembered beside the tables (`loading.parts`). A run with nothing but new
parts gets them added; a run with a part that changed or went is loaded again, whole. So the tables depend on what is on
the disk, not on how it came there.
"""

import datetime
import logging
from collections import defaultdict
from importlib.resources import as_file, files
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from storage.artifacts import ArtifactStore
from storage.disk import ABSENT, STAGE_TABLES, Disk, Part, Parts
from storage.errors import StorageError
from storage.keys import file_digest
from storage.tables import SCHEMAS, load_table

log = logging.getLogger("saap.storage")

# what a row belongs to, where that is not (run_id, key): the variant of a metric comes from the stage run, since it is
# measured on one checkpoint whatever that is called; items are many, and the same for all runs that share the artifact
_OWNERS = {"metrics": ("run_id", "key", "variant"), "items": ("key",)}
_OF_A_RUN = ("runs", "stage_runs", "groups", "widths", "training", "metrics", "speed", "loading.parts")
_SQL_TYPES = {"int32": "INTEGER", "int64": "BIGINT", "double": "DOUBLE", "float": "FLOAT", "bool": "BOOLEAN"}
_MOST_WAITING = 1_000_000  # rows

_TABLES = """
create table schema_version (version integer);
create table runs (
    run_id varchar, name varchar, model varchar, data varchar, criterion varchar, ratio double,
    started_at timestamp, finished_at timestamp, status varchar, error varchar, config varchar);
create table stage_runs (
    run_id varchar, position integer, stage varchar, variant varchar, benchmark varchar, key varchar, cached boolean,
    seconds double, finished_at timestamp, skipped varchar);
create table published_results (
    source varchar, "table" varchar, model varchar, ratio double, tuned boolean, method varchar, benchmark varchar,
    value double, misprint boolean, note varchar);
create schema loading;
create table loading.parts (run_id varchar, part varchar, record varchar, stage varchar, key varchar, tables varchar);
"""


def create_tables(connection: duckdb.DuckDBPyConnection, version: int) -> None:
    """A warehouse without runs."""
    connection.begin()  # one, or each statement is flushed to the disk on its own
    connection.execute(_TABLES)
    for table in dict.fromkeys(table for tables in STAGE_TABLES.values() for table in tables):
        columns = [f"{name} varchar" for name in _OWNERS.get(table, ("run_id", "key"))]
        columns += [f"{field.name} {sql_type(field.type)}" for field in SCHEMAS[table]]
        connection.execute(f"create table {table} ({', '.join(columns)})")
    connection.execute(files("storage").joinpath("views.sql").read_text())
    with as_file(files("storage").joinpath("published_results.csv")) as published:
        connection.execute("insert into published_results from read_csv(?, header = true)", [str(published)])
    connection.execute("insert into schema_version values (?)", [version])
    connection.commit()


def follows_disk(connection: duckdb.DuckDBPyConnection, store: ArtifactStore, only: str | None = None) -> bool:
    """Whether the tables hold what the disk holds: of all runs, or of one."""
    try:
        known = _known(connection, only)
    except duckdb.Error:
        return False  # a damaged file
    return not Disk(store).changes(known, only)


def follow_disk(connection: duckdb.DuckDBPyConnection, store: ArtifactStore, only: str | None = None) -> None:
    """Bring the tables up to what the disk holds: of all runs, or of one. In one transaction."""
    for _ in range(3):  # an artifact that turns out damaged is one less for other runs too
        disk = Disk(store)
        changes = disk.changes(_known(connection, only), only)
        loader = _Loader(connection, disk)
        connection.begin()
        for run_id, (there, wanted) in changes.items():
            if any(wanted.get(name) != part for name, part in there.items() if name) or not wanted:
                loader.forget(run_id, there)
        for run_id, (there, wanted) in changes.items():
            if wanted:
                loader.load(run_id, {} if run_id in loader.forgotten else there, wanted)
        loader.flush()
        if loader.forgotten and only is None:
            connection.execute("delete from items where key not in (select key from loading.parts)")
        connection.commit()
        if not loader.damaged:
            break


def sql_type(kind: pa.DataType) -> str:
    return _SQL_TYPES.get(str(kind), "VARCHAR")


def _known(connection: duckdb.DuckDBPyConnection, only: str | None) -> dict[str, Parts]:
    found: dict[str, Parts] = defaultdict(dict)
    rows = connection.execute("from loading.parts where coalesce(run_id = ?, true)", [only]).fetchall()
    for run_id, name, *part in rows:
        found[run_id][name] = Part(*part)
    return dict(found)


class _Loader:
    """Collects rows, and inserts them many at a time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, disk: Disk) -> None:
        self._connection, self._disk = connection, disk
        self.forgotten: set[str] = set()  # runs
        self.damaged = False  # whether an artifact had to be set aside
        self._rows: dict[str, list[list[Any]]] = defaultdict(list)
        self._batches: dict[str, list[pa.Table]] = defaultdict(list)
        self._waiting = 0
        self._owners: set[tuple[Any, ...]] = set()  # whose rows wait to be inserted
        self._manifests: dict[tuple[str, str], dict[str, Any] | None] = {}

    def forget(self, run_id: str, parts: Parts) -> None:
        """Delete all rows of a run, and the items that it names and that changed."""
        self.forgotten.add(run_id)
        for table in _OF_A_RUN:
            self._connection.execute(f"delete from {table} where run_id = ?", [run_id])
        changed = [p.key for p in parts.values() if p.key and p.tables != self._disk.tables_of(p.stage, p.key)]
        self._connection.execute("delete from items where list_contains(?::varchar[], key)", [changed])

    def load(self, run_id: str, there: Parts, wanted: Parts) -> None:
        """Add the parts that are not there yet; the row of the run itself anew."""
        run = self._disk.run(run_id)
        self._connection.execute("delete from runs where run_id = ?", [run_id])
        self._connection.execute("delete from loading.parts where run_id = ? and part = ''", [run_id])
        about = [run[column] for column in ("run_id", "name", "model", "data", "criterion", "ratio")]
        about += [_timestamp(run["started_at"]), _timestamp(run["finished_at"])]
        self._rows["runs"].append([*about, run["status"], run["error"], run["config"]])
        self._rows["loading.parts"].append([run_id, "", wanted[""].record, "", "", ""])
        for name, part in wanted.items():
            if name and name not in there and (stage := self._disk.stage(run_id, name)) is not None:
                tables = self._load_stage(run_id, stage, part.tables)
                self._rows["loading.parts"].append([run_id, name, part.record, part.stage, part.key, tables])

    def _load_stage(self, run_id: str, stage: dict[str, Any], signature: str) -> str:
        """Returns the signature of the tables as they were found."""
        about = [stage[c] for c in ("position", "stage", "variant", "benchmark", "key", "cached", "seconds")]
        self._rows["stage_runs"].append([run_id, *about, _timestamp(stage["at"]), stage["skipped"]])
        if signature in ("", ABSENT):
            return signature  # nothing to load, or the artifact was removed after the run: its rows are gone
        found = []
        for table in STAGE_TABLES[stage["stage"]]:
            owner = {"run_id": run_id, "key": stage["key"], "variant": stage["variant"]}
            owner = {column: owner[column] for column in _OWNERS.get(table, ("run_id", "key"))}
            if not self._is_there(table, owner):
                rows, whole = self._read(stage["stage"], stage["key"], table)
                if not whole:
                    return ABSENT
                if rows is not None:
                    found.append((table, owner, rows))
        for table, owner, rows in found:
            columns = [_repeated(value, rows.num_rows) for value in owner.values()]
            rows = pa.Table.from_arrays([*columns, *rows.columns], [*owner, *rows.schema.names])
            self._owners.add((table, *owner.values()))
            self._batches[table].append(rows)
            self._waiting += rows.num_rows
        if self._waiting > _MOST_WAITING:
            self.flush()
        return signature

    def _is_there(self, table: str, owner: dict[str, Any]) -> bool:
        if (table, *owner.values()) in self._owners:
            return True
        same = " and ".join(f"{column} is not distinct from ?" for column in owner)
        query = f"select 1 from {table} where {same} limit 1"
        # fetchall: DuckDB 2.0 refuses further statements while a result has not been read to its end
        return bool(self._connection.execute(query, [*owner.values()]).fetchall())

    def _read(self, stage: str, key: str, table: str) -> tuple[pa.Table | None, bool]:
        """(rows or None, whether the artifact is there and whole). A damaged one is set aside."""
        store = self._disk.store
        if (stage, key) not in self._manifests:
            self._manifests[stage, key] = store.find(stage, key)
            self.damaged |= self._manifests[stage, key] is None
        manifest = self._manifests[stage, key]
        if manifest is None:
            return None, False
        name = f"{table}.parquet"
        file = store.path(stage, key) / name
        if name not in manifest["files"]:
            return None, True  # made before there was such a table
        try:
            if file_digest(file) != manifest["files"][name]["sha256"]:
                store.set_aside(stage, key, f"{name} has other content than its manifest says")
                self._manifests[stage, key], self.damaged = None, True
                return None, False
            return load_table(file.parent, table), True
        except StorageError as fault:
            if file.exists():
                log.warning("the rows of %s are left out of the warehouse: %s", file, fault)
            return None, file.exists()

    def flush(self) -> None:
        """Insert what waits."""
        for table, rows in self._rows.items():  # as lists: see _repeated
            columns = [list(column) for column in zip(*rows, strict=True)]
            self._connection.execute(f"insert into {table} select {', '.join(['unnest(?)'] * len(columns))}", columns)
        for table, batches in self._batches.items():
            # files from before a column was added have nulls in it
            self._connection.register("batch", pa.concat_tables(batches, promote_options="default"))
            self._connection.execute(f"insert into {table} by name from batch")
            self._connection.unregister("batch")
        self._rows.clear()
        self._batches.clear()
        self._owners.clear()
        self._waiting = 0


def _repeated(value: str | None, count: int) -> pa.Array:
    """A column of one text. Of buffers, since pa.array and pa.scalar import pandas, for half a second."""
    if value is None:
        return pa.nulls(count, pa.string())
    text = value.encode()
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(len(text))
    return pa.StringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text * count))


def _timestamp(seconds: float | None) -> datetime.datetime | None:
    """UTC, to the microsecond below."""
    start = datetime.datetime(1970, 1, 1)
    return None if seconds is None else start + datetime.timedelta(microseconds=int(seconds * 1e6))
