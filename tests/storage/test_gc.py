"""What gc finds and removes, and what it leaves alone."""

import os
import shutil
import signal

import pytest

from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.gc import by_run, by_stage, find_waste, remove, select_runs
from storage.runs import RunRecord, all_runs
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, in_fork, run, tables
from tests.storage.test_warehouse import fill


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "store"
    run(root, "r1")
    run(root, "r2")
    return root


@pytest.fixture
def store(finished, tmp_path):
    return ArtifactStore(shutil.copytree(finished, tmp_path / "store"))


def kinds(waste):
    return sorted(one.kind for one in waste if one.kind != "lock")


def files(root):
    return {str(file.relative_to(root)) for file in root.rglob("*")}


def killed_prune(store):
    """A prune of gigabytes that dies: record, draft and work folder stay."""
    record = RunRecord(store.root, "r3", **ABOUT)
    record.stage(0, stage="score", key="kNone", variant=None, benchmark=None, cached=True, seconds=1.0)
    with store.lock("prune", "big"), store.publish("prune", "big", run_id="r3") as folder:
        (folder / "model.safetensors").write_bytes(bytes(1_000_000))
        (store.work("prune", "big") / "half").write_bytes(bytes(500_000))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_found_without_a_change_and_removed_when_asked(store):
    assert in_fork(lambda: killed_prune(store)) == -signal.SIGKILL
    (store.root / "damaged").mkdir()
    (store.root / "damaged" / "prune-x").write_bytes(bytes(100))
    old = store.root / "runs" / "r1" / "run.12345678.tmp"
    old.write_text("half")
    os.utime(old, (0, 0))
    (store.root / "runs" / "r4" / "stages").mkdir(parents=True)
    before = files(store.root)
    waste = find_waste(store)
    assert files(store.root) == before
    assert kinds(waste) == ["damaged", "draft", "run record", "temporary file", "work folder"]
    assert sum(one.bytes for one in waste) >= 1_500_100
    rows = tables(Warehouse(store.root))
    assert remove(store, waste) >= 1_500_100
    assert find_waste(store) == []
    assert not list(store.root.glob("*/.draft-*"))
    assert tables(Warehouse(store.root)) == rows
    run(store.root, "r5")
    with Warehouse(store.root).reading() as connection:
        found = connection.execute("select cached from stage_runs where run_id = 'r5'").fetchall()
    assert found == [(True,)] * 3


def test_a_run_goes_with_the_artifacts_that_no_other_run_has(store):
    with store.publish("recover", "own", run_id="r2") as folder:  # made, but killed before it was recorded
        (folder / "model").write_bytes(bytes(2000))
    assert kinds(find_waste(store)) == []
    waste = find_waste(store, select_runs(store.root, ids=["r2"]))
    assert [one.path.name for one in waste if one.kind == "artifact"] == ["own"]
    remove(store, waste)
    assert all_runs(store.root) == ["r1"]
    assert store.find("recover", "own") is None
    assert store.find("prune", "kNone") is not None
    with Warehouse(store.root).reading() as connection:
        assert connection.execute("select run_id, count(*) from stage_runs group by all").fetchall() == [("r1", 3)]
    remove(store, find_waste(store, select_runs(store.root, names=["n"])))
    assert list(store.all()) == []


def test_runs_are_picked_by_id_name_and_age(store):
    assert select_runs(store.root) == []
    assert select_runs(store.root, names=["n"]) == ["r1", "r2"]
    assert select_runs(store.root, older_than_days=1) == []
    assert select_runs(store.root, older_than_days=0) == ["r1", "r2"]
    with pytest.raises(StorageError, match="no such run"):
        select_runs(store.root, ids=["r7"])
    with pytest.raises(StorageError, match="no run"):
        select_runs(store.root, names=["other"])


def test_a_copy_of_a_store_without_its_empty_folders_is_cleaned_too(store):
    shutil.rmtree(store.root / "locks")
    waste = find_waste(store, select_runs(store.root, ids=["r1", "r2"]))
    assert {"artifact", "run record"} <= set(kinds(waste))
    assert remove(store, waste) > 0
    assert not list(store.all())


def test_what_a_living_run_uses_is_left_alone(store):
    record = RunRecord(store.root, "r3", **ABOUT)
    with store.lock("prune", "now"), store.publish("prune", "now", run_id="r3") as folder:
        (folder / "model").write_bytes(bytes(10))
        store.work("prune", "now")
        assert kinds(find_waste(store, select_runs(store.root, older_than_days=0))) == ["run record", "run record"]
        with pytest.raises(StorageError, match="at work"):
            select_runs(store.root, ids=["r3"])
    record.finish("completed")


def test_the_space_is_told_by_stage_and_by_run(store):
    with store.publish("recover", "own", run_id="r2") as folder:
        (folder / "model").write_bytes(bytes(5000))
    stages = {name: (number, bytes_) for name, number, bytes_ in by_stage(store)}
    assert stages["recover"][0] == 1
    assert stages["recover"][1] > 5000
    assert sum(bytes_ for _, bytes_ in stages.values()) == sum(
        f.stat().st_size for f in store.root.rglob("*") if f.is_file()
    )
    (first, _, uses, alone), (second, _, uses_second, alone_second) = by_run(store)
    assert (first, second) == ("r1", "r2")
    assert alone == 0
    assert alone_second == stages["recover"][1]
    assert uses_second == uses + alone_second


def test_while_a_damaged_run_record_lies_in_the_store_no_artifact_is_waste(tmp_path):
    fill(tmp_path, "r1")
    store = ArtifactStore(tmp_path)
    (store.root / "runs" / "r1" / "run.json").write_text("")
    with Warehouse(tmp_path).reading():
        pass  # sets the record aside
    assert list(store.root.glob("damaged/runs-r1-*"))
    assert not find_waste(store)
