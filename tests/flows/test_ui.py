"""What Prefect's UI shows of runs, from a real server."""

import time

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.sorting import ArtifactSort

from flows.markdown import _block
from flows.run import saap_run
from flows.sweep import saap_sweep
from storage.runs import all_runs, read_run
from tests.flows.conftest import at_work_in
from tests.flows.pages.conftest import rows_in
from tests.flows.test_graph import QUICK, start, swept

pytestmark = pytest.mark.slow


def artifacts(kind):
    """The newest 200 of this kind: the server gives no more at once."""
    with get_client(sync_client=True) as client:
        return client.read_artifacts(
            artifact_filter=ArtifactFilter(type={"any_": [kind]}), sort=ArtifactSort.CREATED_DESC
        )


def named(name):
    """The flow run of this name."""
    with get_client(sync_client=True) as client:
        (found,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name={"any_": [name]}))
    return found


def test_a_full_block_is_a_layer_left_whole():
    assert [_block(share) for share in (0, 0.01, 0.5, 0.99, 1)] == [" ", "▁", "▄", "▇", "█"]


def test_a_run_and_a_sweep_show_results_widths_and_checkpoints(config, store, tiny_folder, prefect_server):
    quick = [*QUICK, "evaluate.benchmarks=['arc_easy']"]
    run_id = saap_run(str(config), ["name='shown {1}'", *quick])
    flow_run = named(f"shown {{1}}: {tiny_folder} at 0.2")
    (shown,) = (a.data for a in artifacts("markdown") if a.key == "run" and a.flow_run_id == flow_run.id)
    (folder,) = store.glob("prune/[!.]*")
    assert f"# Run {run_id}" in shown
    assert f"- pruned: `{folder}`" in shown
    (attention,) = (line for line in shown.splitlines() if line.startswith("attention"))
    assert (len(attention.split(None, 1)[1]), attention[10], attention[-1]) == (6, "█", "█")
    assert "| pruned |" in shown
    before = {a.id for a in artifacts("markdown")}
    saap_sweep(str(swept(config, '{ "prune.ratio" = [0.2, 0.3] }')), ["name='of a {sweep}'", *quick])
    (comparison,) = (a.data for a in artifacts("markdown") if a.key == "sweep" and a.id not in before)
    assert "| 0.3 | pruned |" in comparison
    for ratio in ("0.2", "0.3"):
        flow_run = named(f"of a {{sweep}}: {tiny_folder} at {ratio}")
        with get_client(sync_client=True) as client:
            of_run = client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
        assert {"results", "run", "report"} == {artifact.key for artifact in of_run}


def test_a_killed_run_shows_how_far_it_came_and_is_crashed_once_the_next_run_begins(
    config, store, tiny_folder, prefect_server
):
    killed = start("run", config, "--set", "name='killed'", "--set", "recover.epochs=3000")
    at_work_in(store, "recover")
    name, deadline = f"killed: {tiny_folder} at 0.2", time.monotonic() + 120
    shares: set[float] = set()
    while len(shares) < 2 and time.monotonic() < deadline:
        flow_run = named(name)
        shares = {a.data for a in artifacts("progress") if a.flow_run_id == flow_run.id} | shares
        time.sleep(1)
    assert len(shares) >= 2
    assert all(0 <= share < 100 for share in shares)
    page = store / "runs" / all_runs(store)[0] / "report.html"
    assert rows_in(page, "kept")
    assert "has not been reached yet" in page.read_text()
    killed.kill()
    killed.communicate(timeout=60)
    assert named(name).state_name == "Running"
    saap_run(str(config), ["name='next'", *QUICK])
    after = named(name)
    first, second = all_runs(store)
    assert after.state_name == "Crashed"
    assert first in after.state.message
    assert read_run(store, first)["status"] == "killed"
    assert read_run(store, first)["flow_run"] is None
    assert read_run(store, second)["flow_run"] == str(named(f"next: {tiny_folder} at 0.2").id)
