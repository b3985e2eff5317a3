"""Eight commands at once on one store and one Prefect server, beside readers: none fails, no row is lost or doubled."""

import threading

import pytest

from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tests.flows.conftest import saap
from tests.flows.test_graph import QUICK, start

pytestmark = pytest.mark.slow
TABLES = ("runs", "stage_runs", "metrics", "items", "groups", "widths", "speed")


def tables(store):
    with Warehouse(store).reading() as connection:
        return {table: sorted(map(str, connection.execute(f"from {table}").fetchall())) for table in TABLES}


def read_until(stop, store, failed):
    while not stop.is_set():
        done = saap("sql", "select count(*) from stage_runs", "--csv", "--store", store)
        if done.returncode and "no warehouse" not in done.stderr:
            failed.append(done.stderr)
        stop.wait(1)


def test_eight_runs_beside_three_readers_lose_and_double_nothing(config, store, prefect_server):
    failed, stop = [], threading.Event()
    readers = [threading.Thread(target=read_until, args=(stop, store, failed)) for _ in range(3)]
    quick = [word for override in QUICK for word in ("--set", override)]
    runs = [start("run", config, *quick, "--set", f"prune.ratio={20 + number}e-2") for number in range(8)]
    for reader in readers:
        reader.start()
    outputs = [run.communicate(timeout=900)[0] for run in runs]
    stop.set()
    for reader in readers:
        reader.join()
    assert [run.returncode for run in runs] == [0] * 8, outputs
    assert not failed
    assert [read_run(store, run_id)["status"] for run_id in all_runs(store)] == ["completed"] * 8
    before = tables(store)
    shared = [row for row in before["stage_runs"] if "'score'" in row and ", False, " in row]
    assert len(shared) == 1  # scored by one of them
    Warehouse(store).rebuild()
    assert tables(store) == before
