#!/usr/bin/env bash
# DuckDB's COPY … TO a bucket by fsspec, when it fails half way, leaves the half in place of the object that was there.
# In a folder it writes beside the old file and renames at the end. Through a file system of Python's it writes to the
# place itself, and closing the file, which the error does, publishes what was written. Where there was no object before,
# it removes the half again.
# Hurts: results that are exported over those of yesterday are gone, and a CSV of the half reads as a whole one.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q duckdb==2.0.0 s3fs==2026.9.0 fsspec==2026.9.0 'moto[server]==5.2.5'
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import logging
import os
from importlib.metadata import version

import duckdb
import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address, port = server.get_host_and_port()
s3fs.S3FileSystem(endpoint_url=f"http://{address}:{port}").mkdir("bucket")
ROWS = 300_000
FAILING = f"select i, case when i = {ROWS - 1000} then error('no') else repeat('x', 40) end as v from range({ROWS}) t(i)"


def connected():
    connection = duckdb.connect()
    connection.register_filesystem(s3fs.S3FileSystem(endpoint_url=f"http://{address}:{port}", skip_instance_cache=True))
    return connection


def rows(file):
    try:
        return connected().execute(f"select count(*) from '{file}'").fetchone()[0]
    except duckdb.Error as error:
        return "no such file" if "No files found" in str(error) else "not readable"


def after_a_failure(file, old):
    connection = connected()
    connection.execute("set threads = 1")
    if old:
        connection.execute(f"copy (select i, 'old' as v from range(7) t(i)) to '{file}'")
    try:
        connection.execute(f"copy ({FAILING}) to '{file}'")
    except duckdb.InvalidInputException:
        return rows(file)
    raise SystemExit("the statement was to fail")


seen = {
    "folder": after_a_failure("old.csv", old=True),
    "bucket, CSV": after_a_failure("s3://bucket/old.csv", old=True),
    "bucket, Parquet": after_a_failure("s3://bucket/old.parquet", old=True),
    "bucket, nothing before": after_a_failure("s3://bucket/new.csv", old=False),
}
server.stop()
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("duckdb", "s3fs", "fsspec", "moto")))
print("expected: the 7 old rows, wherever they were")
print(f"seen: rows after a statement of {ROWS} that failed: {seen}")
assert (seen["folder"], seen["bucket, Parquet"], seen["bucket, nothing before"]) == (7, "not readable", "no such file")
assert 7 < seen["bucket, CSV"] < ROWS
PY
