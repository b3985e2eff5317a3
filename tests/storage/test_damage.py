"""Whatever lies where the warehouse, a record or a table should be: questions are answered, or end in one line."""

import json
import os
import shutil

import duckdb
import numpy as np
import pytest

from storage.artifacts import SMALL, ArtifactStore
from storage.errors import StorageError
from storage.keys import digest
from storage.query import ask
from storage.runs import RunRecord, all_runs
from storage.tables import sample_writer
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, BOOLQ, PLAIN, run, tables, without_rights_over_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(a store with two finished runs, the tables of its warehouse)."""
    root = tmp_path_factory.mktemp("finished") / "store"
    run(root, "r1")
    run(root, "r2")
    return root, tables(Warehouse(root))


@pytest.fixture
def root(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "store")


def replaced(make):
    def harm(file):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
        make(file)

    return harm


def full_folder(file):
    file.mkdir()
    (file / "mine.txt").write_text("x")


def executed(statement):
    def harm(file):
        with duckdb.connect(str(file)) as connection:
            connection.execute(statement)

    return harm


def zeroed(first):
    def harm(file):
        content = bytearray(file.read_bytes())
        content[first:] = bytes(len(content) - first)
        file.write_bytes(content)

    return harm


def beside(name, make):
    return lambda file: make(file.with_name(name))


ODD = {
    "a folder": replaced(os.mkdir),
    "a full folder": replaced(full_folder),
    "a pipe": replaced(os.mkfifo),
    "a link to itself": replaced(lambda file: file.symlink_to(file.name)),
    "a link to nothing": replaced(lambda file: file.symlink_to("gone")),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": zeroed(0),
    "text": lambda file: file.write_text("hello"),
}
WAREHOUSES = ODD | {
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "without its last block": lambda file: os.truncate(file, file.stat().st_size - 1),
    "its header": lambda file: os.truncate(file, 3 * 4096),
    "longer": lambda file: file.write_bytes(file.read_bytes() + bytes(10_000)),
    "of another program": replaced(executed("create table x as select 1 as a")),
    "of another version": executed("update schema_version set version = 0"),
    "without its memory": executed("drop table loading.parts"),
    "beside a log of another": beside("warehouse.duckdb.wal", lambda file: file.write_bytes(b"x" * 5000)),
    "beside a folder for a log": beside("warehouse.duckdb.wal", os.mkdir),
}


@pytest.mark.parametrize("harm", WAREHOUSES.values(), ids=WAREHOUSES)
def test_a_damaged_warehouse_is_made_again_by_who_asks_first(finished, root, harm, caplog):
    harm(root / "warehouse.duckdb")
    assert tables(Warehouse(root)) == finished[1]
    if harm in (WAREHOUSES["half"], WAREHOUSES["text"], WAREHOUSES["a folder"]):
        assert "damaged" in caplog.text
    harm(root / "warehouse.duckdb")
    Warehouse(root).rebuild()
    assert tables(Warehouse(root)) == finished[1]
    assert (root / "warehouse.duckdb").is_file()


@pytest.mark.parametrize(
    ("harm", "query"),
    [
        (executed("drop view leaderboard"), "from leaderboard"),
        (executed("drop table items"), "from items"),
        (executed("alter table metrics drop column value"), "select value from metrics"),
        (zeroed(5 * 262144), "from items"),
    ],
    ids=["view", "table", "column", "blocks"],
)
def test_damage_that_a_query_meets_is_mended_and_told_in_one_line(finished, root, harm, query):
    harm(root / "warehouse.duckdb")
    with pytest.raises(StorageError, match=r"made again: give the command again$"):
        ask(root, query)
    ask(root, query)
    assert tables(Warehouse(root)) == finished[1]


def test_a_mistake_in_a_query_is_told_as_such(root, caplog):
    before = (root / "warehouse.duckdb").stat().st_ino
    for query in ("from nonsense", "select nonsense from runs", "select error('x')", "select 'x'::integer"):
        with pytest.raises(StorageError) as told:
            ask(root, query)
        assert "damaged" not in str(told.value)
    assert (root / "warehouse.duckdb").stat().st_ino == before
    assert not caplog.text


RECORDS = ODD | {
    "half a character": lambda file: file.write_text(file.read_text().replace('"mini"', '"\\ud800"')),
    "a status of its own": lambda file: file.write_text(file.read_text().replace("completed", "done")),
    "no sections": lambda file: file.write_text(file.read_text().replace('"{}"', '"{\\"prune\\": 3}"')),
    "half a character inside": lambda file: file.write_text(
        file.read_text().replace('"{}"', json.dumps('{"prune": {"kinds": "\\ud800"}}'))
    ),
    "too deep": lambda file: file.write_text("[" * 100_000),
}


@pytest.mark.parametrize("harm", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_takes_only_its_own_run_along(root, harm, caplog):
    harm(root / "runs" / "r2" / "run.json")
    assert ask(root, "select run_id from runs")[1] == [("r1",)]
    if all_runs(root) == ["r1"]:  # a link to nothing is there for nobody
        run(root, "r2")
        assert ask(root, "select count(*) from stage_runs")[1] == [(6,)]


@pytest.mark.parametrize("harm", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", ["stages/0002.json", "stages"])
def test_a_damaged_stage_record_takes_only_its_stage_along(root, name, harm):
    if name == "stages" and harm not in [*ODD.values()][:5]:
        (root / "runs" / "r2" / "stages").rename(root / "elsewhere")
        (root / "runs" / "r2" / "stages").touch()
    harm(root / "runs" / "r2" / name)
    left = 5 if name != "stages" else 3
    assert ask(root, "select count(*), count(distinct run_id) from stage_runs")[1][0][0] == left
    assert ask(root, "select count(*) from runs")[1] == [(2,)]


@pytest.mark.parametrize("harm", ODD.values(), ids=ODD)
def test_all_tables_damaged_leave_the_runs_and_are_made_again(finished, root, harm):
    for file in root.glob("*/*/*.parquet"):
        harm(file)
    query = "select (select count(*) from runs), (select count(*) from metrics), (select count(*) from importance)"
    assert ask(root, query)[1] == [(2, 0, 0)]
    Warehouse(root).rebuild()
    assert ask(root, query)[1] == [(2, 0, 0)]
    run(root, "r3")
    assert ask(root, query)[1] == [(3, 3, 10)]


@pytest.mark.parametrize(
    "manifest",
    [{"inputs": [1]}, {"inputs": [["a", "b"]]}, {"versions": {"torch": [2]}}, {"outside": {"data": 3}}, {"files": []}],
    ids=str,
)
def test_a_manifest_of_another_shape_is_a_damaged_one(root, manifest):
    file = root / "score" / PLAIN / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | manifest))
    assert ask(root, "select count(*) from importance")[1] == [(0,)]
    assert [one.name[:-9] for one in (root / "damaged").iterdir()] == [f"score-{PLAIN}"]


HIDDEN = [
    *("runs", "runs/r2", "runs/r2/run.json", "runs/r2/stages", "runs/r2/stages/0001.json", "evaluate"),
    *(f"evaluate/{BOOLQ}/metrics.parquet", f"evaluate/{BOOLQ}/manifest.json", f"score/{PLAIN}/importance.parquet"),
]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_may_not_be_read_is_neither_damaged_nor_absent(root, finished, name):
    (root / "warehouse.duckdb").unlink()  # so that all is read
    (root / name).chmod(0)

    def look():
        with pytest.raises(OSError, match=r"[Pp]ermission denied"):
            ask(root, "from importance" if name.startswith("score") else "from runs")

    assert without_rights_over_files(look) == 0
    (root / name).chmod(0o755 if (root / name).is_dir() else 0o644)
    assert not (root / "damaged").exists()
    assert tables(Warehouse(root)) == finished[1]


def test_a_warehouse_that_may_not_be_read_is_made_again(root):
    (root / "warehouse.duckdb").chmod(0)

    def look():
        assert ask(root, "select count(*) from runs")[1] == [(2,)]

    assert without_rights_over_files(look) == 0


def publish_large(root):
    """A second importance, larger than what is compared by content always. Returns its file."""
    groups = {"layer": np.zeros(300_000, np.int32), "kind": np.array(["mlp"] * 300_000)}
    groups["unit"] = np.arange(300_000, dtype=np.int32)
    random = np.random.default_rng(0)
    store, key = ArtifactStore(root), digest("large")
    with store.publish("score", key, run_id="r1") as folder, sample_writer(folder, "importance", groups) as writer:
        for _ in range(3):
            writer.write(**{n: random.random((1, 300_000), np.float32) for n in ("vector", "element")})
    file = store.path("score", key) / "importance.parquet"
    assert file.stat().st_size > SMALL
    return file


SUM = "select count(*), sum(vector) + sum(element) from importance"


def test_a_large_importance_file_of_zeros_is_set_aside(root, caplog):
    file = publish_large(root)
    assert ask(root, SUM)[1][0][0] == 900_010
    zeroed(0)(file)
    assert ask(root, SUM)[1][0][0] == 10
    assert f"score/{digest('large')} is damaged" in caplog.text
    assert not file.exists()


def test_a_large_importance_file_with_a_hole_is_told_and_set_aside(root):
    file = publish_large(root)
    content = bytearray(file.read_bytes())
    content[1000:2_000_000] = bytes(1_999_000)
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"importance\.parquet was damaged and is set aside: give the command again"):
        ask(root, SUM)
    assert ask(root, SUM)[1][0][0] == 10


def test_importance_is_compared_with_its_manifest_by_those_who_ask_for_it(root):
    zeroed(0)(root / "score" / PLAIN / "importance.parquet")
    assert ask(root, "select count(*) from runs")[1] == [(2,)]
    assert not (root / "damaged").exists()
    assert ask(root, "select count(*) from Importance")[1] == [(0,)]
    assert [one.name[:-9] for one in (root / "damaged").iterdir()] == [f"score-{PLAIN}"]
    for query in ("show tables", "from duckdb_views()", "select table_name from information_schema.tables"):
        assert "importance" in str(ask(root, query)[1])


def test_views_take_every_seed_that_a_configuration_may_have(root):
    config = {"calibrate": {"seed": 2**32 - 1, "count": 4}, "recover": {"seed": 2**32 - 1, "distill": 0.5}}
    record = RunRecord(root, "r3", **ABOUT | {"config": json.dumps(config)})
    about = {"stage": "evaluate", "key": BOOLQ, "variant": "dense", "benchmark": "boolq"}
    record.stage(0, **about, cached=True, seconds=1.0)
    record.finish("completed")
    assert ask(root, "select seed, samples from ablations where run_id = 'r3'")[1] == [(2**32 - 1, 4)]
    assert ask(root, "from recovery")[1] == []
