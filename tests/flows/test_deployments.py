"""prefect.yaml, accepted and run by a real server and a real worker."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.warehouse import Warehouse

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def prefect(*arguments, **options):
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_a_server_and_a_worker_accept_and_run_the_deployments(config, store, prefect_server):
    made = prefect("work-pool", "create", "saap", "--type", "process")
    assert made.returncode == 0, made.stdout + made.stderr
    deployed = prefect("deploy", "--all")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        sweep = client.read_deployment_by_name("saap-sweep/family-sweep")
        assert [schedule.schedule.cron for schedule in sweep.schedules] == ["0 2 * * 0"]
        deployment = client.read_deployment_by_name("saap/run")
        flow_run = client.create_flow_run_from_deployment(deployment.id, parameters={"config": str(config)})
    worked = prefect(
        "worker", "start", "--pool", "saap", "--run-once", env={**os.environ, "PREFECT_LOGGING_LEVEL": "INFO"}
    )
    assert worked.returncode == 0, worked.stdout + worked.stderr
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
        if state.is_final():
            break
        time.sleep(0.5)
    assert state.is_completed(), (state, worked.stdout[-3000:], worked.stderr[-3000:])
    with Warehouse(store).reading() as connection:
        assert connection.execute("select name, status from runs").fetchall() == [("tiny", "completed")]


def test_a_sweep_shares_what_its_runs_have_in_common(config, store, prefect_server):
    from flows.sweep import saap_sweep

    config.write_text('sweep = { "prune.ratio" = [0.2, 0.3, 0.4] }\n' + config.read_text())
    assert len(saap_sweep(str(config))) == 3
    assert "wikitext2" in (store / "tiny.html").read_text()  # also of a sweep that a deployment runs
    with Warehouse(store).reading() as connection:
        rows = connection.execute("select stage, computed, reused from stage_reuse").fetchall()
    reuse = {stage: (computed, reused) for stage, computed, reused in rows}
    assert reuse["score"] == (1, 2)
    assert reuse["prune"] == (3, 0)
    assert reuse["evaluate"] == (2 + 3 * 4, 2 * 2)


def test_a_run_of_no_configuration_fails_with_the_line(tmp_path, prefect_server):
    from flows.run import saap_run

    state = saap_run(str(tmp_path / "none.toml"), [], return_state=True)
    assert state.is_failed()
    assert "cannot read the config" in state.message
