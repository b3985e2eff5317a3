"""After an interruption at any point, the warehouse holds what a rebuild from scratch would."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tests.storage.kill_points import STEPS, kill_everywhere, on_disk, run, tables


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory where there is one: a disk takes its time for each of thousands of flushes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_killed_at_every_file_operation_and_statement_the_warehouse_follows_the_disk(in_memory):
    root, kept = in_memory / "store", in_memory / "kept"
    points, kills = kill_everywhere(root, kept)
    assert points > 1000
    assert kills > 300
    states = sorted(folder for folder in kept.iterdir() if folder.is_dir())
    assert len(states) > 75
    rebuilt = {}
    for number, state in enumerate(states):
        house = Warehouse(state)
        house.sync()
        followed, disk = tables(house), on_disk(state)
        if disk not in rebuilt:
            house.rebuild()
            rebuilt[disk] = tables(house)
        assert followed == rebuilt[disk], state.name
        if number % 25 == 0:
            goes_on(state, house)
        shutil.rmtree(state)


def goes_on(root, house):
    """The next run finds and adds what is to be there."""
    run(root, "r9")
    with house.reading() as connection:
        house.show_importance(connection)
        stages = "(select count(*) from stage_runs where run_id = 'r9')"
        query = f"select {stages}, (select count(*) from items), (select count(*) from importance)"
        assert connection.execute(query).fetchall() == [(len(STEPS), 4, 10)]
    assert {read_run(root, run_id)["status"] for run_id in all_runs(root)} <= {"killed", "completed"}
    assert not list(root.glob(".warehouse-*"))
