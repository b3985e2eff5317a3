"""The warehouse under pressure: many commands at once beside readers, random kills, what following the disk costs.

    python benchmarks/warehouse.py                      # 20 rounds of 8 runs beside 3 readers; 300 kills; times
    python benchmarks/warehouse.py --rounds 2 --kills 20

A run is what `saap run` does in a store, the stages' computing aside: record, find or publish, load, for 3 stages.
After each round the tables must hold every run once and equal those of a rebuild. Kills are by SIGKILL after a random
time, 10 runs one after the other in a store; then the same comparison. Prints a table and, as its last line, one JSON
object.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from storage.artifacts import ArtifactStore
from storage.runs import all_runs
from storage.warehouse import Warehouse
from tests.storage.kill_points import in_fork, run, tables

WRITERS, READERS, KILLS_A_STORE = 8, 3, 10


def start(action) -> int:  # type: ignore[no-untyped-def]
    """The process id of a fork that runs the action and exits with 1 on an error."""
    child = os.fork()
    if child == 0:
        os._exit(in_fork(action))
    return child


def read_until(root: Path, flag: Path) -> None:
    """Every read must give whole runs and metrics, whatever is written meanwhile."""
    seen = 0
    while not flag.exists():
        with Warehouse(root).reading() as connection:
            query = "select (select count(*) from runs), count(*), count(distinct (run_id, position)) from stage_runs"
            ((runs, stages, distinct),) = connection.execute(query).fetchall()
            assert stages == distinct
            assert runs >= seen, "a run was lost"
            seen = runs


def crowd(folder: Path) -> tuple[bool, int]:
    """(whether the warehouse is right, commands that failed) after 8 runs beside 3 readers."""
    root, flag = folder / "store", folder / "over"
    ArtifactStore(root).prepare()
    run(root, "r0")
    readers = [start(lambda: read_until(root, flag)) for _ in range(READERS)]
    writers = [start(lambda name=f"r{i + 1}": run(root, name)) for i in range(WRITERS)]  # type: ignore[misc]
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in writers)
    flag.touch()
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in readers)
    followed = tables(Warehouse(root))
    Warehouse(root).rebuild()
    counts = len(followed["main.runs"]), len(followed["main.stage_runs"]), len(followed["main.metrics"])
    return followed == tables(Warehouse(root)) and counts == (9, 27, 9), failed


def kills(folder: Path, most_seconds: float, source: random.Random) -> tuple[bool, int]:
    """(whether the warehouse is right, kills) after runs that were killed at random times."""
    root, killed = folder / "store", 0
    ArtifactStore(root).prepare()
    for number in range(KILLS_A_STORE):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                run(root, f"r{number}")
            os._exit(0)
        time.sleep(source.random() * most_seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    Warehouse(root).sync()
    followed = tables(Warehouse(root))
    Warehouse(root).rebuild()
    return followed == tables(Warehouse(root)), killed


def times(folder: Path, runs: int) -> dict[str, float]:
    """Median milliseconds in a store of that many runs: a load, a look at a store that has not changed, a rebuild."""
    root = folder / "store"
    for number in range(runs):
        run(root, f"r{number:03d}")
    house = Warehouse(root)

    def look() -> None:
        with house.reading() as connection:
            connection.execute("select count(*) from runs").fetchall()

    found = {}
    for name, action in {"load": lambda: house.load("r000"), "read": look, "rebuild": house.rebuild}.items():
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - began)
        found[name] = round(1000 * float(np.median(seconds)), 1)
    assert len(all_runs(root)) == runs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--runs", type=int, default=50, help="in the store whose times are taken")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    wrong = failed = killed = killed_wrong = stores = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds):
            (folder := Path(name) / f"crowd{number}").mkdir()
            right, errors = crowd(folder)
            wrong, failed = wrong + (not right), failed + errors
            shutil.rmtree(folder)
        began = time.perf_counter()
        run(Path(name) / "once" / "store", "r0")
        most = 1.1 * (time.perf_counter() - began)
        while killed < arguments.kills:
            (folder := Path(name) / f"kills{stores}").mkdir()
            right, count = kills(folder, most, source)
            killed, killed_wrong, stores = killed + count, killed_wrong + (not right), stores + 1
            shutil.rmtree(folder)
        (Path(name) / "times").mkdir()
        found = times(Path(name) / "times", arguments.runs)
    print(f"{'':<44}{'number':>8}{'wrong':>8}{'failed':>8}")
    print(f"{'rounds of 8 runs at once beside 3 readers':<44}{arguments.rounds:>8}{wrong:>8}{failed:>8}")
    print(f"{f'kills at random times, in {stores} stores':<44}{killed:>8}{killed_wrong:>8}")
    for what, milliseconds in found.items():
        print(f"{f'{what}, in a store of {arguments.runs} runs':<44}{milliseconds:>8.1f} ms")
    figures = {"rounds": arguments.rounds, "rounds_wrong": wrong, "commands_failed": failed}
    figures |= {"kills": killed, "stores": stores, "stores_wrong": killed_wrong}
    print(json.dumps(figures | {f"{what}_ms": value for what, value in found.items()}))


if __name__ == "__main__":
    main()
