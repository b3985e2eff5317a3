#!/usr/bin/env bash
# Runs that were planned for the hours in which a Prefect server was down all start when it is back.
# The server plans a schedule's next runs ahead and keeps them; a runner that asks again takes every one that is late. cron,
# and systemd's timers if not told otherwise, leave out what they missed.
# Hurts: after a night's outage an hourly job of a GPU starts a dozen times.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi>=0.139,<0.151' 'sqlalchemy>=2.0,<2.1'
export PREFECT_HOME="$folder/prefect" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_LOGGING_LEVEL=ERROR
cat > often.py <<'PY'
from prefect import flow


@flow
def often():
    pass


if __name__ == "__main__":
    often.serve(name="often", interval=15)
PY
cat > outage.py <<'PY'
import os
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timezone
from importlib.metadata import version

from prefect.client.orchestration import get_client

DOWN = 90  # seconds
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
processes = []


def start(*arguments):
    processes.append(subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return processes[-1]


def server():
    started = start("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2)
            return started
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not start")


def stop(process):
    process.terminate()
    process.wait(30)


def completed():
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=200)
    return [run for run in runs if run.state.is_completed()]


def wait_for(condition):
    for _ in range(180):
        if condition():
            return
        time.sleep(1)
    raise SystemExit("nothing came")


try:
    first = server()
    start("often.py")
    wait_for(completed)
    stop(first)
    left = datetime.now(timezone.utc)
    time.sleep(DOWN)
    server()
    back = datetime.now(timezone.utc)
    wait_for(lambda: any(run.expected_start_time > back for run in completed()))
    time.sleep(10)
    missed = [run for run in completed() if left < run.expected_start_time < back]
finally:
    for process in processes:
        stop(process)
print("versions: prefect", version("prefect"))
print("expected: what was planned for the time without a server is left out")
late = [round((run.start_time - run.expected_start_time).total_seconds()) for run in missed]
print(f"seen: {len(missed)} runs, one every 15 s of {DOWN} s, started {sorted(late)} s late")
assert len(missed) >= DOWN // 15 - 1 and all(run.start_time > back for run in missed)
PY
timeout 500 env/bin/python outage.py 2> log || { cat log; exit 1; }
