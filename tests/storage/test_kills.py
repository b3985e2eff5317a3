"""Whatever is interrupted where: afterwards the warehouse holds what a rebuild from scratch would."""

import shutil
import signal

import pytest

from storage.artifacts import ArtifactStore
from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tests.storage.kill_points import STEPS, in_child, run, tables

KILLS_A_ROUND = 16


def rebuilt(root, elsewhere):
    """The tables as made from scratch, in a copy of the store."""
    shutil.copytree(root, elsewhere, symlinks=True)
    (elsewhere / "warehouse.duckdb").unlink()
    Warehouse(elsewhere).rebuild()
    found = tables(Warehouse(elsewhere))
    shutil.rmtree(elsewhere)
    return found


def test_killed_at_every_file_operation_and_statement_the_warehouse_follows_the_disk(tmp_path):
    code, points = in_child(lambda: run(tmp_path / "undisturbed", "r"))
    assert code == 0
    assert points > 300
    kills = 0
    for first in range(1, points + 1, KILLS_A_ROUND):
        root = tmp_path / f"round{first}"
        ArtifactStore(root).prepare()
        for kill_at in range(first, min(first + KILLS_A_ROUND, points + 1)):
            code, _ = in_child(lambda: run(root, f"r{kill_at:04d}"), kill_at)  # noqa: B023
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)  # what is there already is fewer operations
        house = Warehouse(root)
        house.sync()
        found = tables(house)
        assert found == rebuilt(root, tmp_path / "rebuilt")
        assert in_child(lambda: run(root, "r9999"))[0] == 0  # noqa: B023
        statuses = {read_run(root, run_id)["status"] for run_id in all_runs(root)}
        assert statuses <= {"killed", "completed"}
        with house.reading() as connection:
            rows = connection.execute("select count(*) from stage_runs where run_id = 'r9999'").fetchone()
            assert rows == (len(STEPS),)
            query = "select count(*), sum(value) from metrics where run_id = 'r9999'"
            assert connection.execute(query).fetchone() == (2, 1.0)
            assert connection.execute("select count(*) from items").fetchone() == (8,)
            assert connection.execute("select count(*) from importance").fetchone() == (10,)
        assert not list(root.glob(".warehouse-*"))
        shutil.rmtree(root)
    assert kills > 300
