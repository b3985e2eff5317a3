"""A run's history in the store, with a process killed at each of its file operations and database statements.

Every operation is counted as it begins: those of Python's files by an audit hook, those of DuckDB by a wrapper that
counts before and after each statement. What a kill there leaves is what is then on the disk, nothing else outlives a
process: where that is new since the point before, the process forks, the fork dies by SIGKILL, and the disk is copied.
So does it at every fourth other point, where a copy would be one that is there already.
"""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np

from storage import database, loading, warehouse
from storage.artifacts import ArtifactStore
from storage.keys import digest
from storage.runs import RunRecord
from storage.tables import sample_writer, write_table
from storage.warehouse import Warehouse
from tests.storage.test_tables import GROUPS

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "fcntl.flock"}
ABOUT = {"name": "n", "model": "m", "data": "mini", "ratio": 0.2, "config": "{}"}
METRIC = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "protocol": "p", "papers": True, "data": "mini"}
STEPS = (("score", None), ("prune", None), ("evaluate", "boolq"))
PLAIN, BOOLQ = digest(None), digest("boolq")  # the keys of these


class Killer:
    """Called at every operation in a store: a fork of this process dies there, and new states of the disk are kept."""

    def __init__(self, root: Path, kept: Path) -> None:
        self.root, self.kept, self.points, self.kills, self.states = root, kept, 0, 0, set()
        self.busy = False

    def __call__(self) -> None:
        if self.busy:
            return
        self.busy = True
        self.points += 1
        state = tuple(sorted(self._state()))
        if state not in self.states or self.points % 4 == 0:
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
            self.kills += 1
        if state not in self.states:
            self.states.add(state)
            shutil.copytree(self.root, self.kept / f"{self.points:05d}-{os.getpid()}")
        self.busy = False

    def _state(self):
        """Every file: name, size, time, inode. Of a warehouse in the making only that it is there: it is never read."""
        for folder, _, names in os.walk(self.root):
            yield (folder,)
            for name in names:
                stat = os.stat(os.path.join(folder, name))
                yield (folder, ".new") if name.startswith(".warehouse-") else (
                    folder, name, stat.st_size, stat.st_mtime_ns, stat.st_ino)  # fmt: skip


class Counted:
    """A DuckDB connection whose every statement is two points."""

    def __init__(self, connection, point):
        self._connection, self._point = connection, point

    def __getattr__(self, name):
        found = getattr(self._connection, name)

        def call(*arguments):
            self._point()
            result = found(*arguments)
            self._point()
            return result

        return call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._point()
        self._connection.close()
        self._point()


class CountedDuckDB:
    Error, DuckDBPyConnection = duckdb.Error, duckdb.DuckDBPyConnection

    def __init__(self, point):
        self._point = point

    def connect(self, *arguments, **options):
        self._point()
        return Counted(duckdb.connect(*arguments, **options), self._point)


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


def run(root, run_id, steps=STEPS):
    """What `saap run` does in the store, the stages' computing aside."""
    store = ArtifactStore(root)
    store.prepare()
    house = Warehouse(store.root)
    house.sync()
    record = RunRecord(store.root, run_id, **ABOUT)
    house.load(run_id)
    for position, (stage, benchmark) in enumerate(steps):
        key = digest(benchmark)
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


def in_fork(action):
    """Run it in a process of its own; returns its exit code, 1 for an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            logging.getLogger("saap.tests").exception(error)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_rights_over_files(action):
    """Run it in a fork: root may no longer do what the files' modes forbid."""

    def drop_rights_and_act():
        if os.getuid() == 0:
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(header, none) == 0
        action()

    return in_fork(drop_rights_and_act)


def die_while_running(root, run_id):
    record = RunRecord(root, run_id, **ABOUT)
    about = {"stage": "score", "key": PLAIN, "variant": None, "benchmark": None}
    record.stage(0, **about, cached=True, seconds=1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def history(root):
    """A run, one that dies, a damaged artifact, and a run that meets all of this."""
    run(root, "r1", STEPS[1:])
    in_fork(lambda: die_while_running(root, "r2"))
    metrics = root / "evaluate" / BOOLQ / "metrics.parquet"
    metrics.write_bytes(bytes(metrics.stat().st_size))
    run(root, "r3", STEPS[1:])


def main(root, kept):
    killer = Killer(root, kept)
    warehouse.duckdb = database.duckdb = loading.duckdb = CountedDuckDB(killer)
    sys.addaudithook(lambda event, _: killer() if event in FILE_OPERATIONS else None)
    history(root)
    killer.busy = True
    (kept / "counts").write_text(f"{killer.points} {killer.kills}")


def kill_everywhere(root, kept):
    """Run the history; what kills leave comes into folders in `kept`. Returns (points, kills)."""
    root.mkdir()
    kept.mkdir()
    # a process of its own: a small one forks faster
    program = [sys.executable, "-m", "tests.storage.kill_points", root, kept]
    subprocess.run(program, check=True, cwd=Path(__file__).parents[2])
    points, kills = (kept / "counts").read_text().split()
    return int(points), int(kills)


def on_disk(root):
    """What the warehouse is made of: every record, and sizes and times of all other files."""
    found = []
    for file in sorted(file for file in root.rglob("*") if file.is_file() and "warehouse" not in file.name):
        stat = file.stat()
        about = file.read_text() if file.name == "run.json" else (stat.st_size, stat.st_mtime_ns)
        found.append((str(file.relative_to(root)), about))
    return str(found)


def tables(house):
    """All rows of all tables, with what they were loaded from."""
    with house.reading() as connection:
        query = "select schema_name || '.' || table_name from duckdb_tables() where database_name = 'warehouse'"
        names = connection.execute(query).fetchall()
        found = {name: sorted(map(str, connection.execute(f"from {name}").fetchall())) for (name,) in names}
        house.show_importance(connection)
        found["importance"] = sorted(map(str, connection.execute("from importance").fetchall()))
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
