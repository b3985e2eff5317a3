"""A store is a folder: moved, copied, read-only, damaged in places, or used by other programs, it serves."""

import json
import os
import shutil
import subprocess
import sys

import duckdb
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.query import ask
from storage.runs import RunRecord, all_runs, read_run, stage_files
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, BOOLQ, PLAIN, in_fork, run, tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with two finished runs, the second one found everything."""
    root = tmp_path_factory.mktemp("finished") / "store"
    run(root, "r1")
    run(root, "r2")
    return root


@pytest.fixture
def root(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "store")


def counts(root):
    names = ("runs", "stage_runs", "widths", "metrics", "items", "importance")
    with Warehouse(root).reading() as connection:
        Warehouse(root).show_importance(connection)
        return {name: connection.execute(f"select count(*) from {name}").fetchone()[0] for name in names}


WHOLE = {"runs": 2, "stage_runs": 6, "widths": 2, "metrics": 2, "items": 4, "importance": 10}


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("name", "harm", "left"),
    [
        ("runs/r2/run.json", lambda f: f.write_text(""), {"runs": 1, "stage_runs": 3, "widths": 1, "metrics": 1}),
        ("runs/r2/run.json", lambda f: f.write_text("{}"), {"runs": 1, "stage_runs": 3, "widths": 1, "metrics": 1}),
        ("runs/r2/stages/0002.json", lambda f: f.write_text(""), {"stage_runs": 5, "metrics": 1}),
        ("runs/r2/stages/0002.json", lambda f: f.write_text("[]"), {"stage_runs": 5, "metrics": 1}),
        ("runs/r2/stages/0001.json", lambda f: f.write_text('{"position": 0}'), {"stage_runs": 5, "widths": 1}),
        (f"prune/{PLAIN}/widths.parquet", zeros, {"widths": 0}),
        (f"evaluate/{BOOLQ}/metrics.parquet", zeros, {"metrics": 0, "items": 0}),
        (f"evaluate/{BOOLQ}/items.parquet", lambda f: f.write_bytes(b""), {"metrics": 0, "items": 0}),
        (f"evaluate/{BOOLQ}/manifest.json", lambda f: f.write_text('{"files": []}'), {"metrics": 0, "items": 0}),
        (f"score/{PLAIN}/importance.parquet", zeros, {"importance": 0}),
    ],
)  # fmt: skip
def test_one_damaged_small_file_is_set_aside_and_what_it_held_made_again(root, name, harm, left, caplog):
    harm(root / name)
    assert counts(root) == WHOLE | left
    if not name.startswith("score"):  # read where it lies: found damaged by the run that needs it
        assert "is damaged" in caplog.text
        assert len(list((root / "damaged").iterdir())) == 1
    followed = tables(Warehouse(root))
    Warehouse(root).rebuild()
    assert tables(Warehouse(root)) == followed
    run(root, "r3")
    with Warehouse(root).reading() as connection:
        found = connection.execute("select count(*) from stage_runs where run_id = 'r3'").fetchone()
    assert found == (3,)
    again = {name: left.get(name, n) for name, n in WHOLE.items()} if name.startswith("runs") else WHOLE
    more = {"runs": 1, "stage_runs": 3, "widths": 1, "metrics": 1}
    assert counts(root) == {name: n + more.get(name, 0) for name, n in again.items()}


def test_the_record_of_a_living_run_is_left_to_it(root):
    living = RunRecord(root, "r3", **ABOUT)
    (root / "runs" / "r3" / "run.json").write_text("")
    assert counts(root)["runs"] == 2
    living.finish("completed")
    assert counts(root)["runs"] == 3


def test_a_moved_and_a_copied_store_read_their_own_files(root, tmp_path):
    grown = tables(Warehouse(root))
    copy = tmp_path / "it's a copy"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "score")
    assert counts(copy) == WHOLE | {"importance": 0}
    moved = root.rename(tmp_path / "moved")
    assert tables(Warehouse(moved)) == grown
    for file in (moved / "warehouse.duckdb", *(moved / "runs").rglob("*.json")):
        assert str(root).encode() not in file.read_bytes()


def as_nobody(action):
    """Whether the action succeeds without the right to write."""

    def drop_rights_and_act():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        action()

    return in_fork(drop_rights_and_act) == 0


@pytest.mark.parametrize("stale", [False, True])
def test_a_store_that_cannot_be_written_serves_queries_and_stays_as_it_is(root, tmp_path, stale):
    if stale:  # the last run is on the disk only
        RunRecord(root, "r3", **ABOUT).finish("completed")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)
    before = {file: file.stat().st_mtime_ns for file in (root, *root.rglob("*"))}
    for file in before:
        file.chmod(0o555 if file.is_dir() else 0o444)

    def look():
        query = "select (select count(*) from runs), (select count(*) from importance)"
        assert ask(root, query)[1] == [(2 + stale, 10)]

    assert not as_nobody((root / "new").mkdir)
    assert as_nobody(look)
    for file in before:
        file.chmod(0o755 if file.is_dir() else 0o644)
    assert {file: file.stat().st_mtime_ns for file in (root, *root.rglob("*"))} == before


HOLDER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "reads")
print("open", flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("other", ["reads", "writes"])
def test_a_warehouse_that_another_program_has_open_is_no_obstacle(root, other):
    program = [sys.executable, "-c", HOLDER, str(root / "warehouse.duckdb"), other]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        run(root, "r3")
        assert counts(root)["runs"] == 3
        process.communicate("")
    assert counts(root)["metrics"] == 3


LONG = "select count(*) from range(1000000000) a, range(1000) b where a.range % 7 = b.range % 5"


def test_a_long_query_blocks_neither_a_run_nor_other_queries(root):
    code = f"import sys; from pathlib import Path; from storage.query import ask; print(1, flush=True); ask(Path(sys.argv[1]), '{LONG}')"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        run(root, "r3")
        assert counts(root)["runs"] == 3
        assert process.poll() is None
        process.kill()


def test_one_process_reads_the_old_and_the_new_file_at_once(root):
    with Warehouse(root).reading() as before:
        run(root, "r3")
        assert counts(root)["runs"] == 3
        assert before.execute("select count(*) from runs").fetchall() == [(2,)]


def test_a_writer_that_hangs_is_named_and_readers_see_what_was_there(root, monkeypatch, caplog):
    from storage import locks, warehouse

    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(warehouse, "READER_WAITS", 0.2)
    monkeypatch.setattr(warehouse, "WRITER_WAITS", 0.2)
    code = (
        "import sys; from pathlib import Path; from storage.locks import held\n"
        "with held(Path(sys.argv[1]) / 'warehouse.lock', 'x', 1): print('held', flush=True); sys.stdin.read()"
    )
    program = [sys.executable, "-c", code, str(root)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        RunRecord(root, "r3", **ABOUT).finish("completed")
        Warehouse(root).load("r3")  # no error: it comes later
        assert counts(root)["runs"] == 2
        assert f"process {process.pid}" in caplog.text
        with pytest.raises(StorageError, match="not free"):
            Warehouse(root).rebuild()
        process.communicate("")
    assert counts(root)["runs"] == 3


def test_an_artifact_that_went_and_came_back_takes_its_rows_along(root, tmp_path):
    before = tables(Warehouse(root))
    aside = (root / "evaluate" / BOOLQ).rename(tmp_path / "aside")
    assert counts(root) == WHOLE | {"metrics": 0, "items": 0}
    aside.rename(root / "evaluate" / BOOLQ)
    assert tables(Warehouse(root)) == before
    shutil.rmtree(root / "runs" / "r1")
    assert counts(root) == WHOLE | {"runs": 1, "stage_runs": 3, "metrics": 1, "widths": 1}


def test_blocks_of_the_warehouse_that_went_bad_are_made_again(root):
    before = tables(Warehouse(root))
    content = bytearray((root / "warehouse.duckdb").read_bytes())
    content[3 * 4096 :] = bytes(len(content) - 3 * 4096)
    (root / "warehouse.duckdb").write_bytes(content)
    assert tables(Warehouse(root)) == before


def test_a_store_that_went_is_one_line_and_does_not_come_back(root):
    record = RunRecord(root, "r3", **ABOUT)
    shutil.rmtree(root)
    with pytest.raises(StorageError, match="store was removed"):
        record.finish("completed")
    with pytest.raises(StorageError, match="is gone"):
        Warehouse(root).load("r3")
    store = ArtifactStore(root)
    with pytest.raises(StorageError, match="is gone"), store.lock("score", "k"):
        pass
    assert not root.exists()


def test_a_store_removed_while_a_stage_works_is_one_line(root):
    def work(folder):
        shutil.rmtree(root)
        (folder / "late").write_text("x")

    store = ArtifactStore(root)
    with pytest.raises(StorageError, match="was removed"), store.publish("score", "k") as folder:
        work(folder)


def test_records_written_before_there_were_all_fields_are_read(root):
    file = root / "runs" / "r1" / "run.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("criterion", "error")}
    file.write_text(json.dumps(old))
    stage = stage_files(root, "r1")[0]
    stage.write_text(json.dumps({k: v for k, v in json.loads(stage.read_text()).items() if k != "skipped"}))
    assert all_runs(root) == ["r1", "r2"]
    assert read_run(root, "r1")["criterion"] == "saap"
    assert counts(root) == WHOLE
    with duckdb.connect(str(root / "warehouse.duckdb"), read_only=True) as connection:
        assert connection.execute("select criterion from runs").fetchall() == [("saap",), ("saap",)]
