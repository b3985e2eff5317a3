import json
import multiprocessing
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.keys import digest
from storage.runs import RunRecord, mark_killed, read_run
from storage.tables import sample_writer, write_table
from storage.warehouse import Warehouse
from tests.storage.test_tables import GROUPS

ABOUT = {"name": "n", "model": "m", "data": "mini", "ratio": 0.2, "config": "{}"}
METRIC = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "protocol": "p", "papers": True, "data": "mini"}
SCORE = digest("score")  # a key


def fill(root, run_id, benchmarks=("boolq", "piqa")):
    """A run with one scored model, two evaluations and a speed table, all published for real."""
    import numpy as np

    store = ArtifactStore(root)
    store.prepare()
    record = RunRecord(store.root, run_id, **ABOUT)
    if store.find("score", SCORE) is None:
        with (
            store.publish("score", SCORE, run_id=run_id) as folder,
            sample_writer(folder, "importance", GROUPS) as writer,
        ):
            writer.write(vector=np.ones((2, 5), np.float32), element=np.ones((2, 5), np.float32))
    record.stage(0, stage="score", key=SCORE, variant=None, benchmark=None, cached=False, seconds=1.0)
    for position, benchmark in enumerate(benchmarks, 1):
        key = digest([run_id, benchmark])
        with store.publish("evaluate", key, run_id=run_id) as folder:
            write_table(folder, "metrics", [{"benchmark": benchmark, **METRIC}])
        about = {"stage": "evaluate", "key": key, "variant": "dense", "benchmark": benchmark}
        record.stage(position, **about, cached=False, seconds=2.0)
    record.finish("completed")
    return Warehouse(store.root)


def ask(warehouse, query, *values):
    with warehouse.reading() as connection:
        warehouse.show_importance(connection)
        return connection.execute(query, values).fetchall()


def everything(warehouse):
    tables = ("runs", "stage_runs", "groups", "widths", "metrics", "speed", "training", "importance")
    views = ("leaderboard", "comparison", "stage_reuse")
    return {name: sorted(map(str, ask(warehouse, f"select * from {name}"))) for name in (*tables, *views)}


def test_a_run_loaded_twice_is_there_once(tmp_path):
    warehouse = fill(tmp_path, "r1")
    warehouse.load("r1")
    before = everything(warehouse)
    warehouse.load("r1")
    assert everything(warehouse) == before
    assert ask(warehouse, "select run_id, variant, benchmark, value, n from metrics order by benchmark") == [
        ("r1", "dense", "boolq", 0.5, 4),
        ("r1", "dense", "piqa", 0.5, 4),
    ]
    assert ask(warehouse, "select count(*), max(sample), sum(vector) from importance where kind = 'mlp'") == [
        (6, 1, 6.0)
    ]


def test_the_rebuilt_warehouse_equals_the_one_that_grew(tmp_path):
    for run_id in ("r1", "r2"):
        warehouse = fill(tmp_path, run_id)
        warehouse.load(run_id)
    grown = everything(warehouse)
    warehouse.file.unlink()
    assert warehouse.rebuild() == 2
    assert everything(warehouse) == grown


@pytest.mark.parametrize("next_use", ["load", "read"])
def test_a_warehouse_of_another_version_or_a_broken_one_is_rebuilt(tmp_path, next_use):
    import duckdb

    warehouse = fill(tmp_path, "r1")
    warehouse.load("r1")
    grown = everything(warehouse)

    def found():
        if next_use == "load":
            warehouse.load("r1")
        return everything(warehouse)

    with duckdb.connect(str(warehouse.file)) as connection:
        connection.execute("update schema_version set version = 0; drop view leaderboard; delete from metrics")
    assert found() == grown
    warehouse.file.write_bytes(b"broken")
    assert found() == grown


def _write_runs(root, first):
    for index in range(first, first + 5):
        fill(root, f"r{index:02d}").load(f"r{index:02d}")


def test_four_processes_at_once_lose_and_double_nothing(tmp_path):
    fill(tmp_path, "r99").load("r99")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_runs, args=(tmp_path, 10 * i)) for i in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    warehouse = Warehouse(tmp_path)
    assert ask(warehouse, "select count(*), count(distinct run_id) from runs") == [(21, 21)]
    assert ask(warehouse, "select count(*), count(distinct (run_id, benchmark)) from metrics") == [(42, 42)]
    assert ask(warehouse, "select count(*) from stage_runs") == [(63,)]


def test_reuse_counts_what_was_computed_and_what_was_found(tmp_path):
    warehouse = fill(tmp_path, "r1")
    record = RunRecord(warehouse.root, "r2", **ABOUT)
    record.stage(0, stage="score", key=SCORE, variant=None, benchmark=None, cached=True, seconds=1.0)
    record.finish("completed")
    for run_id in ("r1", "r2"):
        warehouse.load(run_id)
    query = "select uses, computed, reused, seconds_spent, seconds_saved from stage_reuse where stage = 'score'"
    assert ask(warehouse, query) == [(2, 1, 1, 1.0, 1.0)]


def test_the_average_is_withheld_unless_all_seven_accuracies_are_there(tmp_path):
    seven = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa")
    fill(tmp_path, "all", seven).load("all")
    warehouse = fill(tmp_path, "six", seven[:6])
    warehouse.load("six")
    assert dict(ask(warehouse, "select run_id, average from leaderboard")) == {"all": 0.5, "six": None}
    assert ask(warehouse, f"select {', '.join(seven)} from results where run_id = 'six'") == [(0.5,) * 6 + (None,)]


def test_a_recovery_is_told_by_its_steps_and_the_share_of_the_gap_it_closed(tmp_path):
    store = ArtifactStore(tmp_path)
    store.prepare()
    about = ABOUT | {"config": '{"recover": {"recipe": "lora", "seed": 3, "distill": 0.5}}'}
    record = RunRecord(store.root, "r", **about)
    steps = [
        {"step": i, "epoch": i / 2, "loss": 3.0 - i, "learning_rate": 1e-4, "tokens_per_s": 9.0 + i, "held_out_loss": h}
        for i, h in ((1, None), (2, 2.5), (3, 2.75))
    ]
    with store.publish("recover", "t", run_id="r") as folder:
        write_table(folder, "training", steps)
    record.stage(0, stage="recover", key="t", variant=None, benchmark=None, cached=False, seconds=7.0)
    for position, (variant, value) in enumerate({"dense": 2.0, "pruned": 32.0, "recovered": 8.0}.items(), 1):
        with store.publish("evaluate", variant, run_id="r") as folder:
            perplexity = METRIC | {"metric": "perplexity"}
            both = [{"benchmark": "wikitext2", "value": value}, {"benchmark": "ptb", "value": value**2}]
            write_table(folder, "metrics", [perplexity | one for one in both])
        found = {"stage": "evaluate", "key": variant, "variant": variant, "benchmark": "wikitext2"}
        record.stage(position, **found, cached=False, seconds=1.0)
    warehouse = Warehouse(store.root)
    warehouse.load("r")
    columns = "recipe, seed, distill, steps, seconds, training_tokens_per_s, last_loss, held_out_loss"
    columns += ", gap_closed, gap_closed_ptb"
    ((*found, gap, gap_ptb),) = ask(warehouse, f"select {columns} from recovery")
    assert found == ["lora", 3, 0.5, 3, 7.0, 11.0, 0.0, 2.5]
    assert gap == gap_ptb == pytest.approx(0.5)  # 32 → 8 of 32 → 2, and their squares


def test_a_run_whose_process_was_killed_is_told_from_a_living_one(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from storage.runs import RunRecord\n"
        f"RunRecord(Path({str(tmp_path)!r}), 'dead', **{json.loads(json.dumps(ABOUT))!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    living = RunRecord(tmp_path, "living", **ABOUT)
    assert mark_killed(tmp_path) == ["dead"]
    assert read_run(tmp_path, "dead")["status"] == "killed"
    assert read_run(tmp_path, "living")["status"] == "running"
    living.finish("completed")


def test_a_run_that_died_after_it_was_loaded_is_killed_for_the_next_reader(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from storage.runs import RunRecord\n"
        "from storage.warehouse import Warehouse\n"
        f"root = Path({str(tmp_path)!r})\n"
        f"RunRecord(root, 'dead', **{ABOUT!r}); Warehouse(root).load('dead')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    living = RunRecord(tmp_path, "living", **ABOUT)
    assert ask(Warehouse(tmp_path), "select run_id, status from runs order by 1") == [
        ("dead", "killed"),
        ("living", "running"),
    ]
    living.finish("completed")


def test_a_store_of_files_from_before_and_after_a_column_was_added_is_loaded_at_once(tmp_path):
    store = ArtifactStore(tmp_path)
    store.prepare()
    for key in ("old", "new"):
        record = RunRecord(store.root, key, **ABOUT)
        with store.publish("speed", key, run_id=key) as folder:
            file = write_table(folder, "speed", [{"variant": "dense", "parameters": 7, "runs": 3}])
            if key == "old":
                pq.write_table(pq.read_table(file).drop_columns(["runs"]), file)
        record.stage(0, stage="speed", key=key, variant=None, benchmark=None, cached=False, seconds=1.0)
        record.finish("completed")
    assert Warehouse(store.root).rebuild() == 2
    found = ask(Warehouse(store.root), "select run_id, parameters, runs from speed order by run_id")
    assert found == [("new", 7, 3), ("old", 7, None)]


def test_asking_before_anything_ran_says_what_to_do(tmp_path):
    with pytest.raises(StorageError, match="saap run"), Warehouse(tmp_path).reading():
        pass


def test_the_leaderboard_has_a_row_for_each_different_result_best_first(tmp_path):
    store = ArtifactStore(tmp_path)
    store.prepare()
    values = {"good": 0.75, "poor": 0.25}
    for key, value in values.items():
        for benchmark in ("boolq", "piqa"):
            with store.publish("evaluate", f"{key}-{benchmark}", run_id="r1") as folder:
                metric = METRIC | {"benchmark": benchmark, "metric": "perplexity", "value": 1 / value}
                write_table(folder, "metrics", [metric | {"benchmark": "wikitext2" if benchmark == "piqa" else "ptb"}])
    runs = {  # run → variant → the benchmarks it has got to
        "r1": {"dense": "good boolq piqa", "pruned": "poor boolq piqa"},
        "r2": {"dense": "good boolq piqa", "pruned": "poor boolq piqa"},  # the same again
        "r3": {"dense": "good boolq"},  # stopped before the end
    }
    for run_id, variants in runs.items():
        record, position = RunRecord(store.root, run_id, **ABOUT), 0
        for variant, (key, *benchmarks) in ((v, text.split()) for v, text in variants.items()):
            for benchmark in benchmarks:
                about = {"stage": "evaluate", "variant": variant, "benchmark": benchmark}
                record.stage(position, **about, key=f"{key}-{benchmark}", cached=run_id != "r1", seconds=1.0)
                position += 1
        record.finish("completed")
        Warehouse(store.root).load(run_id)
    found = ask(Warehouse(store.root), "select run_id, variant, criterion, ratio, wikitext2, runs from leaderboard")
    assert found == [("r2", "dense", None, None, 1 / 0.75, 2), ("r2", "pruned", "saap", 0.2, 4.0, 2)]
    assert len(ask(Warehouse(store.root), "from results")) == 5


def test_a_second_reader_of_a_process_sees_what_was_loaded_since_the_first_one(tmp_path):
    warehouse = fill(tmp_path, "r1")
    with warehouse.reading() as first:
        fill(tmp_path, "r2").load("r2")
        assert ask(warehouse, "select count(*) from runs") == [(2,)]
        assert first.execute("select count(*) from runs").fetchall() == [(1,)]
