#!/usr/bin/env bash
# A Prefect task with retries=0 runs again when its Ray worker dies, and Prefect does not know.
# RayTaskRunner submits tasks with Ray's own max_retries of 3. The task starts from its first line in a new process, what
# it had written or counted before is there twice, and the run is recorded as one completed attempt.
# Hurts: a worker killed for memory, the usual end of a model that is too large, is killed four times over.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi>=0.139,<0.151' 'sqlalchemy>=2.0,<2.1' prefect-ray==0.6.0 ray==2.60.0
export PREFECT_HOME="$folder/prefect" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_LOGGING_LEVEL=ERROR
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=180 RAY_USAGE_STATS_ENABLED=0 STARTS="$folder/starts"
cat > tasks.py <<'PY'
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect_ray import RayTaskRunner


def starts():
    return len(Path(os.environ["STARTS"]).read_text().splitlines())


@task(retries=0)
def work():
    with open(os.environ["STARTS"], "a") as file:
        file.write("started\n")
    if starts() < 3:  # what the kernel does to a process that takes too much memory
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@flow(task_runner=RayTaskRunner(init_kwargs={"num_cpus": 2, "include_dashboard": False, "logging_level": "ERROR"}))
def run():
    future = work.submit()
    future.wait(200)
    return future.state.type.value, counted(future.task_run_id)


def counted(task_run_id):
    """The server writes a task run down a while after its end."""
    with get_client(sync_client=True) as client:
        for _ in range(60):
            try:
                return client.read_task_run(task_run_id).run_count
            except ObjectNotFound:
                time.sleep(1)
    return "not recorded within a minute"


if __name__ == "__main__":
    Path(os.environ["STARTS"]).touch()
    state, count = run()
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("prefect", "prefect-ray", "ray")))
    print("expected: one start, and a state that is not completed, as retries=0")
    print(f"seen: {starts()} starts; Prefect's state {state}, its run_count {count}")
    assert starts() == 3 and state == "COMPLETED"
PY
timeout 400 env/bin/python tasks.py 2> log || { cat log; exit 1; }
