"""Whatever is interrupted where: afterwards the warehouse holds what a rebuild from scratch would."""

import os
import shutil
import signal

from storage.runs import RunRecord, all_runs, read_run
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, STEPS, in_fork, kill_everywhere, on_disk, run, tables


def die_while_running(root, run_id):
    record = RunRecord(root, run_id, **ABOUT)
    about = {"stage": "score", "key": "kNone", "variant": None, "benchmark": None}
    record.stage(0, **about, cached=True, seconds=1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def history(root):
    """A run, one that dies, a damaged artifact, and a run that meets all of this."""
    run(root, "r1", STEPS[1:])
    in_fork(lambda: die_while_running(root, "r2"))
    metrics = root / "evaluate" / "kboolq" / "metrics.parquet"
    metrics.write_bytes(bytes(metrics.stat().st_size))
    run(root, "r3", STEPS[1:])


def test_killed_at_every_file_operation_and_statement_the_warehouse_follows_the_disk(tmp_path):
    root = tmp_path / "store"
    points, kills = kill_everywhere(root, tmp_path / "kept", lambda: history(root))
    assert points > 1000
    assert kills > 300
    states = sorted(folder for folder in (tmp_path / "kept").iterdir() if folder.is_dir())
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
        stages = "(select count(*) from stage_runs where run_id = 'r9')"
        query = f"select {stages}, (select count(*) from items), (select count(*) from importance)"
        assert connection.execute(query).fetchall() == [(len(STEPS), 4, 10)]
    assert {read_run(root, run_id)["status"] for run_id in all_runs(root)} <= {"killed", "completed"}
    assert not list(root.glob(".warehouse-*"))
