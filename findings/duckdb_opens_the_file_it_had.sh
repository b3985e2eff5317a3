#!/usr/bin/env bash
# A second DuckDB connection in one process reads the file that was there before.
# A results database is often replaced whole: written beside its place, then renamed over it, so that readers never see
# a half. While any connection of a process is open, duckdb.connect() with the same path gives the database that this
# one holds, not the file that lies there now. No error, old numbers. An in-memory connection that attaches the path is
# right, and so is another process.
# Hurts: a dashboard, a notebook or a training job that keeps one connection and opens another to see what is new.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q duckdb==2.0.0
env/bin/python - <<'PY'
import os
import subprocess
import sys

import duckdb

QUERY = "select accuracy from results"


def write(file, accuracy):
    with duckdb.connect(file) as connection:
        connection.execute(f"create table results as select {accuracy} as accuracy")


def read(connection, query=QUERY):
    return connection.execute(query).fetchall()[0][0]


write("results.duckdb", 1)
first = duckdb.connect("results.duckdb", read_only=True)
before = read(first)
write("new.duckdb", 2)
os.replace("new.duckdb", "results.duckdb")
with duckdb.connect("results.duckdb", read_only=True) as second:
    again = read(second)
with duckdb.connect() as memory:
    memory.execute("attach 'results.duckdb' as file (read_only)")
    attached = read(memory, "select accuracy from file.results")
program = f"import duckdb; print(duckdb.connect('results.duckdb', read_only=True).execute('{QUERY}').fetchall()[0][0])"
elsewhere = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
first.close()
with duckdb.connect("results.duckdb", read_only=True) as alone:
    closed = read(alone)
print("version: duckdb", duckdb.__version__)
print("expected: 1 before the file is replaced, 2 from every connection that is opened after it")
print(f"seen: {before}, then {again} from a second connection, although another process reads {elsewhere}")
print(f"seen: {attached} when an in-memory connection attaches the file, {closed} once the first connection is closed")
assert (before, again, attached, elsewhere, closed) == (1, 1, 2, 2, 2)
PY
