#!/usr/bin/env bash
# Tasks in Prefect's ProcessPoolTaskRunner do not see the environment they were submitted with.
# The pool starts its processes with the first task and they keep the environment of that moment. A flow that sets
# CUDA_VISIBLE_DEVICES before each submit, one device a task, sends every task to the first device.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi>=0.139,<0.151' 'sqlalchemy>=2.0,<2.1'
export PREFECT_HOME="$folder/prefect" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_LOGGING_LEVEL=ERROR
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=180
unset CUDA_VISIBLE_DEVICES
cat > tasks.py <<'PY'
import os
from importlib.metadata import version

from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner


@task
def device():
    return os.environ["CUDA_VISIBLE_DEVICES"]


@task
def told(number):
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    return os.environ["CUDA_VISIBLE_DEVICES"]


@flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
def one_device_a_task():
    futures = []
    for number in range(4):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
        futures.append(device.submit())
    by_environment = [future.result() for future in futures]
    return by_environment, [future.result() for future in [told.submit(number) for number in range(4)]]


if __name__ == "__main__":
    by_environment, by_argument = one_device_a_task()
    print("versions: prefect", version("prefect"))
    print("expected: devices ['0', '1', '2', '3'], one a task")
    print(f"seen: {by_environment} set by the flow; {by_argument} passed as an argument and set by the task")
    assert by_environment == ["0"] * 4 and by_argument == ["0", "1", "2", "3"]
PY
env/bin/python tasks.py 2> log || { cat log; exit 1; }
