#!/usr/bin/env bash
# On a processor with bfloat16 instructions `import peft` asks the model hub for code, before any model is named.
# peft imports bitsandbytes where that is installed. bitsandbytes looks there for a faster product for NF4 weights if the
# package `kernels` is installed, and warns where it gets none: so which code multiplies depends on the network at import.
# It also compiles as it is imported, which brings in all of torch's compiler and takes longer than importing torch.
set -euo pipefail
grep -qE '^flags.* avx512_bf16' /proc/cpuinfo || { echo "needs an x86 processor with AVX512-BF16: not run"; exit 0; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 bitsandbytes==0.50.2 peft==0.21.2 accelerate==1.15.0 kernels==0.17.2
env/bin/python - <<'PY'
import http.server
import os
import subprocess
import sys
import threading
from importlib.metadata import version

asked = []


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_GET(self):
        asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": "cache"}
environment.pop("HF_HUB_OFFLINE", None)


def imported(module):
    """(what the hub was asked, stderr, whether torch's compiler came along)"""
    asked.clear()
    code = f"import sys, {module}; print('torch._inductor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return list(asked), done.stderr, "True" in done.stdout


print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "peft", "kernels")))
print("expected: an import asks nobody for anything, and says nothing")
for module in ("torch", "bitsandbytes", "peft"):
    paths, said, compiler = imported(module)
    about = [path for path in paths if "kernels-community" in path]
    print(f"seen: import {module}: asked for {about}, with torch's compiler: {compiler}, said: {said.strip()[:90]!r}")
    if module == "torch":
        assert not about and not compiler
    else:
        assert about and compiler and "from kernels-community" in said
PY
