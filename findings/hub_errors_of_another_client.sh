#!/usr/bin/env bash
# huggingface_hub's network errors are neither OSError nor httpx.HTTPError, though httpx is installed.
# From 2.4 the client speaks httpx2, a package of its own. What it raises has httpx2's types, which share no base with
# httpx's beyond Exception, and, other than requests' in earlier versions, none with OSError. The one error type that the
# library names for the hub, HfHubHTTPError, is for answers; a hub that cannot be reached gives none. hf_hub_download
# alone turns it into one of its own.
# Hurts: retries and fall-backs to the cache around the hub that were right for the clients before; they let it pass.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q huggingface_hub==2.4.0 httpx==0.28.1 requests
HF_HOME=$folder/home env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import socket
from importlib.metadata import version

import httpx
import requests
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

with socket.socket() as free:  # nobody listens there once it is closed
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
api = HfApi(endpoint=f"http://127.0.0.1:{port}")
KNOWN = (OSError, httpx.HTTPError, requests.RequestException, HfHubHTTPError)
seen = {}
for name in ("model_info", "dataset_info", "list_repo_files"):
    try:
        getattr(api, name)("any/thing")
    except Exception as error:
        seen[name] = f"{type(error).__module__}.{type(error).__name__}", isinstance(error, KNOWN)
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("huggingface_hub", "httpx", "httpx2")))
print("expected: a hub that cannot be reached is one of", ", ".join(kind.__name__ for kind in KNOWN))
for name, (kind, known) in seen.items():
    print(f"seen: {name} raises {kind}, {'one' if known else 'none'} of these")
assert len(seen) == 3
assert all(kind.startswith("httpx2.") and not known for kind, known in seen.values())
PY
