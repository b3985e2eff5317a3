#!/usr/bin/env bash
# A download by s3fs of an object that is replaced meanwhile is half the old one and half the new one.
# Objects beyond 50 MiB come in ranges, each a request of its own, and nothing says that all must be of one version
# (no If-Match, no version id). The size is right, no error is raised. A smaller object is one request, and one version.
# `open` asks for the version it saw first, and raises FileExpired.
# Hurts: fetching checkpoints or Parquet that a training overwrites ("latest.safetensors"): the file loads, and is neither.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q s3fs==2026.9.0 fsspec==2026.9.0 'moto[server]==5.2.5'
env/bin/python - <<'PY'
import logging
import os
import threading
from importlib.metadata import version

import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
application = DomainDispatcherApplication(create_backend_app)
SIZE = 150 * 2**20  # three ranges
old, new = b"1" * SIZE, b"2" * SIZE
ranges, turn = 0, threading.Lock()


def served(environ, start_response):
    """Between the first range and the others another client replaces the object, as may happen at any time."""
    global ranges
    if environ["REQUEST_METHOD"] != "GET" or "HTTP_RANGE" not in environ:
        return application(environ, start_response)
    with turn:
        ranges += 1
        if ranges == 2:
            writer.pipe_file("bucket/latest", new)
        return [b"".join(application(environ, start_response))]


server = make_server("127.0.0.1", 0, served, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()


def client():
    return s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server.server_port}", skip_instance_cache=True)


writer, reader = client(), client()
writer.mkdir("bucket")


def parts(data):
    return {name: round(data.count(digit) / SIZE, 2) for name, digit in (("old", b"1"), ("new", b"2"))}


def get_file():
    reader.get_file("bucket/latest", "latest")
    with open("latest", "rb") as file:
        return file.read()


seen = {}
for name, read in (("get_file", get_file), ("cat_file", lambda: reader.cat_file("bucket/latest"))):
    writer.pipe_file("bucket/latest", old)
    reader.invalidate_cache()
    ranges = 0
    data = read()
    assert len(data) == SIZE
    seen[name] = parts(data)
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("s3fs", "fsspec", "moto")))
print("expected: all of the old object, all of the new one, or an error")
print(f"seen: shares of each in one download: {seen}")
assert all(0 < share < 1 for shares in seen.values() for share in shares.values())
PY
