#!/usr/bin/env bash
# The last lines of a Prefect run that is killed never reach the server.
# Lines are kept in the process and sent every two seconds, or when it ends as it should. A process that the kernel ends
# for its memory takes with it the lines that would say what it was doing. On its own output they are complete.
# Hurts: the end of a job that ran out of memory is read on the server's page, and there it stops too early.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi>=0.139,<0.151' 'sqlalchemy>=2.0,<2.1'
export PREFECT_HOME="$folder/prefect" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
cat > killed.py <<'PY'
import os
import signal
import time

from prefect import flow, get_run_logger


@flow
def killed():
    for number in range(90):
        get_run_logger().info("line %d", number)
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does to a process that takes too much memory


killed()
PY
cat > server.py <<'PY'
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version

from prefect.client.orchestration import get_client

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
start = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
server = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    done = subprocess.run([sys.executable, "killed.py"], capture_output=True, text=True)
    time.sleep(10)
    with get_client(sync_client=True) as client:
        stored = [log.message for log in client.read_logs(limit=200)]
finally:
    server.terminate()
    server.wait(30)
printed = {int(number) for number in re.findall(r"line (\d+)", done.stdout + done.stderr)}
kept = {int(found[1]) for message in stored if (found := re.fullmatch(r"line (\d+)", message))}
print("versions: prefect", version("prefect"))
print("expected: the same lines in both places")
print(f"seen: {len(printed)} lines printed, {len(kept)} on the server, the last of them number {max(kept)}")
assert done.returncode == -9 and printed == set(range(90))
assert kept == set(range(len(kept))) and 40 < len(kept) < 90
PY
timeout 400 env/bin/python server.py 2> log || { cat log; exit 1; }
