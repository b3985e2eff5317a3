#!/usr/bin/env bash
# s3fs opens an object that exists with "xb", takes all that is written, and says only on closing that it exists.
# Python's open() raises at once. S3 can refuse only the request that completes an upload: the computing and the sending
# are done by then. What was sent as parts stays, as an unfinished upload that no listing shows and that is paid for.
# Hurts: "xb" is the obvious lock between hosts that compute the same thing; here all of them compute it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q s3fs==2026.9.0 fsspec==2026.9.0 'moto[server]==5.2.5'
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import logging
import os
from importlib.metadata import version

import boto3
import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address, port = server.get_host_and_port()
url = f"http://{address}:{port}"
files = s3fs.S3FileSystem(endpoint_url=url)
files.mkdir("bucket")
content = b"x" * (12 * 2**20)


def unfinished():
    client = boto3.client("s3", endpoint_url=url)
    uploads = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    parts = [client.list_parts(Bucket="bucket", Key=one["Key"], UploadId=one["UploadId"])["Parts"] for one in uploads]
    return sum(part["Size"] for some in parts for part in some)


def exclusive(step):
    """Whether this raises FileExistsError."""
    try:
        step()
        return False
    except FileExistsError:
        return True


files.pipe_file("bucket/done", b"by another host")
file = None


def opened():
    global file
    file = files.open("bucket/done", "xb", block_size=5 * 2**20)


seen = {"open": exclusive(opened), "write": exclusive(lambda: file.write(content)), "close": exclusive(lambda: file.close())}
left = unfinished()
whole = exclusive(lambda: files.pipe_file("bucket/done", content * 10, mode="create"))
more = unfinished() - left
kept = files.cat_file("bucket/done") == b"by another host"
listed = files.find("bucket")
server.stop()
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("s3fs", "fsspec", "moto", "boto3")))
print("expected: open raises FileExistsError")
print(f"seen: raised by {seen}; the old object is kept: {kept}; bytes of unfinished uploads: {left}; listed: {listed}")
print(f"seen: pipe_file(mode='create') raises it too: {whole}, and leaves {more} bytes")
assert seen == {"open": False, "write": False, "close": True} and kept and whole
assert more == 0 and left == len(content) and listed == ["bucket/done"]
PY
