#!/usr/bin/env bash
# A Prefect task that waits for its retry keeps its concurrency slot.
# The limit "gpu: 1" is meant to be held while the device is in use. During retry_delay_seconds nothing runs, and nobody
# else may. A sweep with one failing step and a delay of ten minutes leaves the device idle for ten minutes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi>=0.139,<0.151' 'sqlalchemy>=2.0,<2.1'
export PREFECT_HOME="$folder/prefect" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_LOGGING_LEVEL=CRITICAL
cat > tasks.py <<'PY'
import asyncio
from importlib.metadata import version
from threading import Event

from prefect import flow, get_client, task
from prefect.futures import wait
from prefect.testing.utilities import prefect_test_harness

order, failed = [], Event()


@task(tags=["gpu"], retries=1, retry_delay_seconds=20)
def flaky():
    order.append("flaky")
    if not failed.is_set():
        failed.set()
        raise RuntimeError("the first attempt fails")


@task(tags=["gpu"])
def other():
    order.append("other")


@flow
def run():
    first = flaky.submit()
    failed.wait(60)
    wait([first, other.submit()])


async def limit():
    async with get_client() as client:
        await client.create_concurrency_limit(tag="gpu", concurrency_limit=1)


with prefect_test_harness(server_startup_timeout=180):
    asyncio.run(limit())
    run()
print("versions: prefect", version("prefect"))
print("expected: ['flaky', 'other', 'flaky'], the other task running during the 20 s before the retry")
print("seen:", order)
assert order == ["flaky", "flaky", "other"]
PY
env/bin/python tasks.py 2> log || { cat log; exit 1; }
