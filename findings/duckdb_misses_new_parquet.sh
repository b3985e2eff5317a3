#!/usr/bin/env bash
# DuckDB over an fsspec file system goes on counting the files it saw first.
# A glob is answered from fsspec's listing cache, which has no end of life by default. Files that other processes
# add are left out of every later query of this process: no error, a smaller count.
# Hurts: a dashboard or a sweep that watches a store of Parquet on S3 while other machines write to it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q duckdb==2.0.0 pyarrow==26.0.1 s3fs==2026.9.0 fsspec==2026.9.0 'moto[server]==5.2.5'
env/bin/python - <<'PY'
import logging
import os
from importlib.metadata import version

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
address, port = server.get_host_and_port()


def client():
    return s3fs.S3FileSystem(endpoint_url=f"http://{address}:{port}", skip_instance_cache=True)


def write(fs, name, rows):
    with fs.open(f"results/{name}", "wb") as file:
        pq.write_table(pa.table({"x": list(range(rows))}), file)


reader, other = client(), client()
other.mkdir("results")
write(other, "a.parquet", 10)
connection = duckdb.connect()
connection.register_filesystem(reader)


def count():
    return connection.execute("select count(*) from read_parquet('s3://results/*.parquet')").fetchone()[0]


first = count()
write(other, "b.parquet", 90)
second = count()
exists = reader.exists("results/b.parquet")
found = len(reader.find("results"))
reader.invalidate_cache()
third = count()
server.stop()
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("duckdb", "s3fs", "fsspec", "moto")))
print("expected: 10 rows, then 100 once another client has added a file")
print(f"seen: {first}, then {second}; exists() of the new file: {exists}, files that find() lists: {found}")
print(f"seen: {third} after invalidate_cache()")
assert (first, second, exists, found, third) == (10, 10, False, 2, 100)
PY
