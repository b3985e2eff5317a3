"""Questions of a user to the warehouse: they read it and nothing else."""

import decimal
import math
import re
from pathlib import Path
from typing import Any

import duckdb

from storage.errors import StorageError
from storage.warehouse import Warehouse

_READS = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}  # MULTI: pivot
# the one way to write where reading is allowed, into the importance Parquet: it may hide in an EXPLAIN ANALYZE
_COPIES = re.compile(r"\b(copy|export|import)\b", re.IGNORECASE)

# its files are compared with their manifests before it is shown: a second for each thousand of them
_MAY_NAME_IMPORTANCE = re.compile("importance|show|describe|summarize|duckdb_|schema|query", re.IGNORECASE)


def ask(root: Path, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(columns, rows) of a query. Raises StorageError with one line for what is wrong."""
    try:
        statements = duckdb.extract_statements(query)
        if not statements:
            raise StorageError("the query is empty: try 'select * from leaderboard'")
        for statement in statements:
            hidden = statement.type != duckdb.StatementType.SELECT and _COPIES.search(statement.query)
            if statement.type not in _READS or hidden:
                raise StorageError(f"queries are read-only, this is none: {' '.join(statement.query.split())[:80]}")
        if len(statements) > 1:
            raise StorageError(f"one query at a time, these are {len(statements)}: ask for each on its own")
        warehouse = Warehouse(root)
        with warehouse.reading() as connection:
            if _MAY_NAME_IMPORTANCE.search(query):
                warehouse.show_importance(connection)
            result = connection.execute(query)
            return [column[0] for column in result.description or []], result.fetchall()
    except duckdb.Error as error:
        raise StorageError(" ".join(str(error).split())[:300]) from error


def as_json(columns: list[str], rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows that JSON can hold: NaN and infinities are null; a column named like one before it gets a number."""
    names: list[str] = []
    for column in columns:
        name, number = column, 2
        while name in names:
            name, number = f"{column}_{number}", number + 1
        names.append(name)
    return [dict(zip(names, map(_plain, row), strict=True)) for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)
