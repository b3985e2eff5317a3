"""Differences and their noise, against scipy."""

import json
import math
import shutil

import duckdb
import numpy as np
import pytest
from scipy import stats

from storage.artifacts import ArtifactStore
from storage.runs import RunRecord
from storage.tables import write_table
from storage.warehouse import Warehouse
from tests.storage.test_warehouse import ABOUT, ask

N = 400
SHOWN = "basis, difference, stderr, low, high, p_value, more_than_noise, seed_spread"


def items_of(seed, accuracy, hard):
    """Right and wrong answers: harder items are answered wrongly by every side."""
    return (np.random.default_rng(seed).random(N) < accuracy * (1 - hard)).astype(float)


@pytest.fixture(scope="module")
def measured():
    """(run, variant) → the values of its items; the run's seed is its number."""
    hard = np.random.default_rng(0).random(N) < 0.3
    nll = np.random.default_rng(1).gamma(8, 0.5, N)
    found = {("r0", "dense", "acc"): items_of(2, 0.95, hard), ("r0", "dense", "perplexity"): nll}
    for seed, accuracy in enumerate((0.7, 0.73, 0.67)):
        found[f"r{seed}", "pruned", "acc"] = items_of(10 + seed, accuracy, hard)
    found["r0", "pruned", "perplexity"] = nll + np.random.default_rng(5).normal(0.02, 0.1, N)
    return found


@pytest.fixture(scope="module")
def warehouse(measured, tmp_path_factory):
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    store.prepare()
    warehouse = Warehouse(store.root)
    for run_id in ("r0", "r1", "r2"):
        places = {
            "r0": {},
            "r1": {"store_remote": None, "execute": {"runner": "ray"}},
            "r2": {"store_remote": "s3://bucket/x", "recover": {"micro_batch_size": 2}},
        }[run_id]
        config = json.dumps({"name": run_id, **places, "calibrate": {"seed": int(run_id[1])}})
        record = RunRecord(store.root, run_id, **(ABOUT | {"config": config}))
        for position, ((_, variant, metric), values) in enumerate(
            (about, values) for about, values in measured.items() if about[0] == run_id
        ):
            text = metric == "perplexity"
            row = {"benchmark": "ptb" if text else "boolq", "metric": metric, "n": N, "protocol": "p", "data": "d"}
            row["value"] = math.exp(values.mean()) if text else values.mean()
            row["stderr"] = stats.sem(values) * (row["value"] if text else 1)
            key = f"{run_id}-{variant}-{metric}"
            with store.publish("evaluate", key) as folder:
                write_table(folder, "metrics", [{**row, "papers": True, "harness": None, "task_version": None}])
                if run_id != "r2":  # as made before items were kept
                    write_table(folder, "items", [{**row, "item": i, "value": v} for i, v in enumerate(values)])
            about = {"stage": "evaluate", "variant": variant, "benchmark": row["benchmark"], "key": key}
            record.stage(position, **about, cached=False, seconds=1.0, skipped=None)
        record.finish("completed")
        warehouse.load(run_id)
    return warehouse


def compare(warehouse, run_a, variant_a, run_b, variant_b, metric):
    query = (
        f"select {SHOWN} from significance where (run_a, variant_a, run_b, variant_b, metric) = "
        f"('{run_a}', '{variant_a}', '{run_b}', '{variant_b}', '{metric}')"
    )
    (row,) = ask(warehouse, query)
    return dict(zip(SHOWN.split(", "), row, strict=True))


@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_the_standard_error_and_bounds_are_those_of_a_paired_bootstrap(warehouse, measured, metric):
    found = compare(warehouse, "r0", "dense", "r0", "pruned", metric)
    a, b = measured["r0", "dense", metric], measured["r0", "pruned", metric]
    drawn = stats.bootstrap((b - a,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    assert found["basis"] == "paired items"
    assert found["difference"] == pytest.approx((b - a).mean())
    assert found["stderr"] == pytest.approx(drawn.standard_error, rel=0.03)
    for bound, theirs in zip((found["low"], found["high"]), drawn.confidence_interval, strict=True):
        assert bound == pytest.approx(theirs, abs=0.12 * drawn.standard_error)


@pytest.mark.parametrize(("run", "variant"), [("r0", "dense"), ("r1", "pruned")])
def test_accuracies_are_tested_by_the_exact_mcnemar_test(warehouse, measured, run, variant):
    found = compare(warehouse, run, variant, "r0", "pruned", "acc")
    difference = measured["r0", "pruned", "acc"] - measured[run, variant, "acc"]
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    assert found["p_value"] == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)


def test_perplexities_are_tested_by_the_normal_distribution(warehouse):
    found = compare(warehouse, "r0", "dense", "r0", "pruned", "perplexity")
    z = found["difference"] / found["stderr"]
    assert found["p_value"] == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-6)
    assert found["more_than_noise"] == (found["p_value"] < 0.05)


def test_without_items_the_two_standard_errors_are_taken_as_independent(warehouse, measured):
    found = compare(warehouse, "r0", "pruned", "r2", "pruned", "acc")
    sides = measured["r0", "pruned", "acc"], measured["r2", "pruned", "acc"]
    assert found["basis"] == "standard errors"
    assert found["stderr"] == pytest.approx(math.hypot(*map(stats.sem, sides)))
    assert found["p_value"] == pytest.approx(2 * stats.norm.sf(abs(found["difference"] / found["stderr"])), abs=1e-6)


def test_runs_that_agree_in_all_but_the_seed_give_the_spread_over_calibration_samples(warehouse, measured):
    accuracies = [measured[f"r{seed}", "pruned", "acc"].mean() for seed in range(3)]
    query = "select seeds, mean, spread from seed_spread where variant = 'pruned' and metric = 'acc'"
    assert ask(warehouse, query) == [(3, pytest.approx(np.mean(accuracies)), pytest.approx(np.std(accuracies, ddof=1)))]
    found = compare(warehouse, "r0", "pruned", "r1", "pruned", "acc")
    assert found["seed_spread"] == pytest.approx(math.sqrt(2) * np.std(accuracies, ddof=1))
    assert found["more_than_noise"] == (found["p_value"] < 0.05 and abs(found["difference"]) > 2 * found["seed_spread"])


def test_a_difference_larger_than_its_noise_is_told_from_a_smaller_one(warehouse):
    assert compare(warehouse, "r0", "dense", "r0", "pruned", "acc")["more_than_noise"]
    assert not compare(warehouse, "r0", "pruned", "r1", "pruned", "acc")["more_than_noise"]


def test_the_same_question_has_the_same_answer_to_the_last_bit_on_many_threads(warehouse, tmp_path):
    """DuckDB adds in the order its threads come, and sums of doubles depend on it."""
    many = 250_000  # several row groups, or one thread does it all
    file = tmp_path / "warehouse.duckdb"
    shutil.copy(warehouse.file, file)
    with duckdb.connect(str(file)) as connection:
        connection.execute("set threads = 4")
        connection.execute(f"update metrics set n = {many} where metric = 'perplexity'")
        connection.execute("create temp table template as select * from items where metric = 'perplexity' and item = 0")
        connection.execute("delete from items where metric = 'perplexity'")
        connection.execute(
            "insert into items select template.* replace (i::integer as item, 1 + random() as value) "
            f"from template cross join range({many}) as numbers(i) order by hash(i)"
        )
        asked = "select stderr, low, p_value, basis from significance where metric = 'perplexity' order by all"
        answers = {str(connection.execute(asked).fetchall()) for _ in range(4)}
    assert len(answers) == 1
    assert "paired items" in answers.pop()
