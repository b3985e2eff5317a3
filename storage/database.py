"""The warehouse's file: opened to be read, and examined."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import duckdb

from storage.loading import create_tables

VERSION = 22  # raise it when a table or view changes: a file of another version is made again from the store
# three headers and the blocks
_SIZE = """
select (3 * 4096 + total_blocks * block_size)::bigint
from pragma_database_size() where database_name = current_database()"""
_DEFINITIONS = """
select sql from duckdb_tables() where database_name = current_database()
union all select sql from duckdb_views() where not internal and database_name = current_database() order by 1"""
_TABLES = "select schema_name || '.' || table_name from duckdb_tables() where database_name = current_database()"


@contextlib.contextmanager
def attached(file: Path) -> Iterator[duckdb.DuckDBPyConnection | None]:
    """A connection of its own that reads the file; None when that is not there, broken, or of another version."""
    with duckdb.connect() as connection:
        whole = False
        with contextlib.suppress(duckdb.Error):
            if file.is_file():  # DuckDB would wait for a pipe
                connection.execute(f"attach {quoted(file)} as warehouse (read_only)")
                connection.execute("use warehouse")
                whole = is_current(connection, file)
        yield connection if whole else None


def is_current(connection: duckdb.DuckDBPyConnection, file: Path) -> bool:
    """Whether the file that is open is of this version. Raises duckdb.Error when it is shorter than it says."""
    if connection.execute("select max(version) from schema_version").fetchall() != [(VERSION,)]:
        return False
    ((size,),) = connection.execute(_SIZE).fetchall()
    if file.stat().st_size < size:
        raise duckdb.Error("it is cut short")
    return True


def seal(file: Path) -> None:
    """Make a file as long as it says, so that one that was cut short is told from it.

    DuckDB leaves out free blocks at the end. Raises duckdb.Error, OSError.
    """
    with duckdb.connect(str(file), read_only=True) as connection:
        ((size,),) = connection.execute(_SIZE).fetchall()
    if file.stat().st_size < size:
        os.truncate(file, size)


def fault_of(file: Path, *, read_all: bool) -> str | None:
    """What is wrong with the file, or None: of its tables and views, and with read_all of every row."""
    with attached(file) as connection, duckdb.connect() as right:
        if connection is None:
            return "it cannot be opened"
        create_tables(right, VERSION)
        try:
            if connection.execute(_DEFINITIONS).fetchall() != right.execute(_DEFINITIONS).fetchall():
                return "its tables and views are not those it was made with"
            for (table,) in connection.execute(_TABLES).fetchall() if read_all else ():
                connection.execute(f"select max(hash(t)) from {table} t").fetchall()
        except duckdb.Error as error:
            return str(error).splitlines()[0]
    return None


def quoted(path: Path) -> str:
    """As a text in SQL."""
    return "'" + str(path).replace("'", "''") + "'"
