"""A run whose data folder lacks a benchmark finishes, says what is missing, and evaluates it later."""

import json
import shutil

import pytest

from tasks.data import mini_folder
from tests.flows.conftest import ask, saap
from tests.flows.test_pipeline import executed, run

pytestmark = pytest.mark.slow


def test_a_run_without_the_data_of_a_benchmark_ends_says_so_and_later_runs_only_that(
    config, store, tmp_path, prefect_server
):
    data = shutil.copytree(mini_folder(), tmp_path / "data")
    (data / "wikitext2_raw" / "test.jsonl").rename(tmp_path / "wikitext2.jsonl")
    options = (f"data={data}", "recover.recipe=none", "evaluate.samples=true")
    first = run(config, *options)
    skipped = {(s["variant"], s["benchmark"]) for s in first if s["skipped"]}
    assert skipped == {("dense", "wikitext2"), ("pruned", "wikitext2")}
    remedy = f"{data} has no wikitext2_raw/test.parquet (or .jsonl), needed for wikitext2: put it there and run again"
    shown = saap("report", "--store", store)
    assert f"skipped wikitext2: {remedy}" in shown.stdout
    assert ask(store, "select distinct skipped from stage_runs where skipped is not null") == [{"skipped": remedy}]
    assert ask(store, "select distinct benchmark, average from metrics join leaderboard using (run_id, variant)") == [
        {"benchmark": "arc_easy", "average": ""}
    ]

    logs = [json.loads(line) for line in next(store.glob("evaluate/*/samples.jsonl")).read_text().splitlines()]
    assert [log["doc_id"] for log in logs] == [0, 1, 2, 3]
    means = (
        "select avg(i.value) = any_value(m.value) as same from items i join metrics m using (key, metric) "
        "group by key, metric"
    )
    assert ask(store, f"select distinct same from ({means})") == [{"same": "True"}]

    (tmp_path / "wikitext2.jsonl").rename(data / "wikitext2_raw" / "test.jsonl")
    assert executed(run(config, *options)) == {("evaluate", v, "wikitext2") for v in ("dense", "pruned")}


def test_data_that_cannot_be_downloaded_while_running_is_skipped_too(config, store, prefect_server, monkeypatch):
    """The hub answers when the run is planned and is gone when a benchmark is downloaded."""
    import tasks.stages.evaluate
    from tasks.data import MissingData

    def gone(data, role):
        raise MissingData("cannot download wikitext: check the network")

    monkeypatch.setattr(tasks.stages.evaluate, "read_data", gone)
    stages = run(config, "recover.recipe=none")
    assert {s["benchmark"]: s["skipped"] for s in stages if s["skipped"]} == {
        "wikitext2": "cannot download wikitext: check the network"
    }
