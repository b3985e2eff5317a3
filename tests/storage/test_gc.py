"""What gc finds and removes, and what it leaves alone."""

import os
import shutil
import signal

import pytest

import storage.gc
from storage.artifacts import MANIFEST, ArtifactStore
from storage.errors import StorageError
from storage.gc import by_run, by_stage, find_waste, remove, select_runs
from storage.keys import digest
from storage.runs import RunRecord, all_runs, arriving
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, PLAIN, in_fork, run, tables, without_rights_over_files
from tests.storage.test_warehouse import fill

BIG, OWN = digest("big"), digest("own")


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
    record.stage(0, stage="score", key=PLAIN, variant=None, benchmark=None, cached=True, seconds=1.0)
    with store.lock("prune", BIG), store.publish("prune", BIG, run_id="r3") as folder:
        (folder / "model.safetensors").write_bytes(bytes(1_000_000))
        (store.work("prune", BIG) / "half").write_bytes(bytes(500_000))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_found_without_a_change_and_removed_when_asked(store):
    assert in_fork(lambda: killed_prune(store)) == -signal.SIGKILL
    (store.root / "damaged").mkdir()
    (store.root / "damaged" / f"prune-{BIG}-12345678").write_bytes(bytes(100))
    old = store.root / "runs" / "r1" / ".run.json.12345678.tmp"
    old.write_text("half")
    os.utime(old, (0, 0))
    (store.root / "runs" / "r4" / "stages").mkdir(parents=True)
    (store.root / "runs" / "r4" / "alive.lock").touch()
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


def test_a_recovery_goes_on_from_a_checkpoint_only(store):
    for key, name in ((BIG, "model.safetensors"), (OWN, "trainer_state.json")):
        checkpoint = store.work("recover", key) / "checkpoint-50"
        checkpoint.mkdir()
        (checkpoint / name).touch()
    store.work("recover", PLAIN)
    why = {one.reference[1]: one.why for one in find_waste(store) if one.kind == "work folder"}
    nothing = "its run ended before a first checkpoint: there is nothing to go on from"
    assert why == {PLAIN: nothing, BIG: nothing, OWN: "its run died; run again, it would go on from here"}


def test_a_run_goes_with_the_artifacts_that_no_other_run_has(store):
    with store.publish("recover", OWN, run_id="r2") as folder:  # made, but killed before it was recorded
        (folder / "model").write_bytes(bytes(2000))
    assert kinds(find_waste(store)) == []
    waste = find_waste(store, select_runs(store.root, ids=["r2"]))
    assert [one.path.name for one in waste if one.kind == "artifact"] == [OWN]
    remove(store, waste)
    assert all_runs(store.root) == ["r1"]
    assert store.find("recover", OWN) is None
    assert store.find("prune", PLAIN) is not None
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
    with store.lock("prune", BIG), store.publish("prune", BIG, run_id="r3") as folder:
        (folder / "model").write_bytes(bytes(10))
        store.work("prune", BIG)
        assert kinds(find_waste(store, select_runs(store.root, older_than_days=0))) == ["run record", "run record"]
        with pytest.raises(StorageError, match="at work"):
            select_runs(store.root, ids=["r3"])
    record.finish("completed")


def test_the_space_is_told_by_stage_and_by_run(store):
    with store.publish("recover", OWN, run_id="r2") as folder:
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


def test_while_a_stage_record_cannot_be_read_no_artifact_is_waste(store, caplog):
    file = store.root / "runs" / "r2" / "stages" / "0002.json"
    key = digest("only r2")
    with store.publish("evaluate", key, run_id="r0") as folder:
        (folder / "x").touch()
    assert kinds(find_waste(store)) == ["artifact"]
    whole = file.read_text()
    file.write_text(whole[:50])
    assert kinds(find_waste(store)) == []
    assert f"no artifact is removed: which ones the damaged {file} refers to is not known" in caplog.text
    assert [row[0] for row in by_run(store)] == ["r1", "r2"]
    file.write_text(whole)
    file.chmod(0)

    def look():
        with pytest.raises(StorageError, match=r"cannot read .*0002\.json \(Permission denied\)$"):
            find_waste(store)

    assert without_rights_over_files(look) == 0


def unused(store, *keys):
    """Artifacts that no run refers to, with their locks."""
    for key in map(digest, keys):
        with store.lock("prune", key), store.publish("prune", key) as folder:
            (folder / "model").write_bytes(bytes(10))


def test_what_a_run_or_pull_may_use_that_has_begun_since_is_left_alone(store, caplog):
    unused(store, "a", "b")
    dropped, keys = select_runs(store.root, ids=["r2"]), set(store.all())
    for how in ("runs", "ran", "is pulled", "is pulled again"):
        waste = find_waste(store, dropped)
        assert kinds(waste) == ["artifact", "artifact", "run record"]
        locks = sorted(store.root.glob("locks/*"))
        if how.startswith("is pulled"):
            with arriving(store.root, "r9" if how == "is pulled" else "r1"):
                remove(store, [one for one in waste if one.kind != "run record"])
        else:
            record = RunRecord(store.root, how, **ABOUT)
            if how == "ran":
                record.finish("completed")
            remove(store, [one for one in waste if one.kind != "run record"])
            if how == "runs":
                record.finish("completed")
        assert (set(store.all()), sorted(store.root.glob("locks/*"))) == (keys, locks), how
        assert "things that it may use are left alone" in caplog.text
        caplog.clear()
    with arriving(store.root, "r2"):
        remove(store, waste)
    assert "r2" in all_runs(store.root)
    assert set(store.all()) == keys
    remove(store, find_waste(store, dropped))
    assert len(set(store.all())) == len(keys) - 2


def test_a_run_that_begins_while_gc_deletes_keeps_what_is_left(store, monkeypatch):
    unused(store, "a", "b", "c")
    waste, keys, left = find_waste(store), set(store.all()), []

    def remove_and_begin(one):
        freed = remove_one(one)
        if not left:
            left.append(RunRecord(store.root, "r9", **ABOUT))
        return freed

    remove_one = storage.gc._remove
    monkeypatch.setattr(storage.gc, "_remove", remove_and_begin)
    remove(store, waste)
    assert len(left) == 1
    assert len(set(store.all())) == len(keys) - 1
    left[0].finish("completed")


FOREIGN = (
    *(
        "models/Llama/model.safetensors",
        "score/mine/importance.parquet",
        "models/0123456789abcdef/x",
        "work/paper/x.tex",
    ),
    *("runs/exp1/events.log", "runs/exp2/run.json", "runs/exp3/stages/0000.json", "damaged/scan-20240101.png"),
    *("locks/poetry.lock", "pages/mine.tmp", "runs/exp1/mine.tmp", "fingerprints/mine.tmp", "models/.draft-of-mine/x"),
)


def test_what_is_not_ours_is_neither_waste_nor_set_aside(store):
    for name in FOREIGN:
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("{}")
        os.utime(store.root / name, (0, 0))
    own = store.path("prune", PLAIN)
    (own / MANIFEST).unlink()
    assert ("prune", PLAIN) in set(store.all())
    remove(store, find_waste(store, select_runs(store.root, older_than_days=0)))
    assert list(store.all()) == []
    assert Warehouse(store.root).rebuild() == 0
    by_stage(store)
    run(store.root, "r3")
    tables(Warehouse(store.root))
    assert all((store.root / name).is_file() for name in FOREIGN)
    assert all_runs(store.root) == ["r3"]
