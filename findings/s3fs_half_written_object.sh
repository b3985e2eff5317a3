#!/usr/bin/env bash
# A writer that fails half way through a file on S3 leaves the half it wrote as a complete object.
# With fsspec, leaving the `with` block by an error closes the file, and closing uploads what is there. A file object
# that is merely dropped does the same when Python collects it. Only a transaction holds the upload back.
# Hurts: "a file that exists is whole" is what caches, checkpoints and manifests on object stores rest on.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q s3fs==2026.9.0 fsspec==2026.9.0 'moto[server]==5.2.5'
env/bin/python - <<'PY'
import gc
import logging
import os
from importlib.metadata import version

import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
address, port = server.get_host_and_port()


def client():
    return s3fs.S3FileSystem(endpoint_url=f"http://{address}:{port}", skip_instance_cache=True)


def seen(path):
    reader = client()
    return reader.info(path)["size"] if reader.exists(path) else None


writer = client()
writer.mkdir("store")
half = b"x" * (6 * 2**20)  # of a file that was to have 12 MiB

try:
    with writer.open("store/raised", "wb") as file:
        file.write(half)
        raise RuntimeError("the other half was not computed")
except RuntimeError:
    pass

file = writer.open("store/dropped", "wb", block_size=5 * 2**20)
file.write(half)
while_open = seen("store/dropped")
del file
gc.collect()

try:
    with writer.transaction, writer.open("store/transaction", "wb") as file:
        file.write(half)
        raise RuntimeError("the other half was not computed")
except RuntimeError:
    pass

result = {name: seen(f"store/{name}") for name in ("raised", "dropped", "transaction")}
server.stop()
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("s3fs", "fsspec", "moto")))
print("expected: no object, as its writer never came to the end")
print(f"seen: bytes of the object, None where there is none: {result}; before it was dropped: {while_open}")
assert result == {"raised": len(half), "dropped": len(half), "transaction": None} and while_open is None
PY
