"""A run's history in the store, killed at any of its file operations and database statements.

Every operation is counted as it is begun: those of Python's files by an audit hook, those of DuckDB by a wrapper that
counts before and after each statement.
"""

import contextlib
import os
import signal
import sys

import duckdb
import numpy as np

from storage import loading, warehouse
from storage.artifacts import ArtifactStore
from storage.runs import RunRecord
from storage.tables import sample_writer, write_table
from storage.warehouse import Warehouse
from tests.storage.test_tables import GROUPS

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "fcntl.flock"}
ABOUT = {"name": "n", "model": "m", "data": "mini", "ratio": 0.2, "config": "{}"}
METRIC = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "protocol": "p", "papers": True, "data": "mini"}
STEPS = (("score", None), ("prune", None), ("evaluate", "boolq"), ("evaluate", "piqa"))
points = {"passed": 0, "kill_at": 0}


def point():
    points["passed"] += 1
    if points["passed"] == points["kill_at"]:
        os.kill(os.getpid(), signal.SIGKILL)


class Counted:
    """A DuckDB connection whose every statement is two points."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        found = getattr(self._connection, name)

        def call(*arguments):
            point()
            result = found(*arguments)
            point()
            return result

        return call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        point()
        self._connection.close()
        point()


class CountedDuckDB:
    Error, DuckDBPyConnection = duckdb.Error, duckdb.DuckDBPyConnection

    @staticmethod
    def connect(*arguments, **options):
        point()
        return Counted(duckdb.connect(*arguments, **options))


def body(stage, benchmark, folder):
    """What the stage publishes, small."""
    if stage == "score":
        with sample_writer(folder, "importance", GROUPS) as writer:
            writer.write(vector=np.ones((2, 5), np.float32), element=np.ones((2, 5), np.float32))
    elif stage == "prune":
        (folder / "model.safetensors").write_bytes(bytes(1000))
        row = {"layer": 0, "kind": "mlp", "units": 4, "kept": 2, "parameters": 8, "kept_parameters": 4}
        write_table(folder, "widths", [row])
    else:
        write_table(folder, "metrics", [{"benchmark": benchmark, **METRIC}])
        items = [{**METRIC, "benchmark": benchmark, "item": i, "value": float(i % 2)} for i in range(4)]
        write_table(folder, "items", items)


def run(root, run_id):
    """What `saap run` does in the store, the stages' computing aside."""
    store = ArtifactStore(root)
    store.prepare()
    house = Warehouse(store.root)
    house.sync()
    record = RunRecord(store.root, run_id, **ABOUT)
    house.load(run_id)
    for position, (stage, benchmark) in enumerate(STEPS):
        key = f"k{benchmark}"
        with store.lock(stage, key):
            if store.find(stage, key) is None:
                with store.publish(stage, key, run_id=run_id) as folder:
                    body(stage, benchmark, folder)
        manifest = store.find(stage, key)
        cached = manifest["run_id"] != run_id
        about = {"stage": stage, "key": key, "variant": "dense" if benchmark else None, "benchmark": benchmark}
        record.stage(position, **about, cached=cached, seconds=manifest["seconds"])
        house.load(run_id)
    record.finish("completed")
    house.load(run_id)


def in_child(action, kill_at=0):
    """Run the action in a fork that dies at the point of that number. Returns (signal or exit code, points passed)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.close(reading)
            warehouse.duckdb = loading.duckdb = CountedDuckDB
            sys.addaudithook(lambda event, _: point() if event in FILE_OPERATIONS else None)
            points.update(passed=0, kill_at=kill_at)
            action()
            os.write(writing, str(points["passed"]).encode())
            code = 0
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        passed = pipe.read()
    _, status = os.waitpid(child, 0)
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), int(passed or 0)


def tables(house):
    """All rows of all tables, and of what says where they came from."""
    with house.reading() as connection:
        names = connection.execute(
            "select schema_name || '.' || table_name from duckdb_tables() where database_name = 'warehouse'"
        ).fetchall()
        found = {name: sorted(map(str, connection.execute(f"from {name}").fetchall())) for (name,) in names}
        found["importance"] = sorted(map(str, connection.execute("from importance").fetchall()))
    return found
