"""A run logged to a real MLflow, its tracking database a file."""

import time

import pytest

from flows.tracking import log_run
from storage.errors import StorageError
from storage.runs import all_runs
from storage.warehouse import Warehouse
from tests.flows.conftest import saap
from tests.flows.pages.made import Maker
from tests.flows.test_cli import refused
from tests.storage.test_warehouse import ask

RUN = "20261127T120000-0aa001"


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(warehouse, MLflow's client, the ids that logging twice gave), far from UTC; four windows of perplexity."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    maker = Maker(folder / "store")
    maker.run(RUN, {"prune": {"ratio": 0.3}, "evaluate": {"windows": [128, 512, 1024, 2048]}})
    maker.warehouse.rebuild()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("saap", artifact_location=(folder / "artifacts").as_uri())
    client.create_run(experiment, tags={"saap.run_id": RUN})  # as a server leaves it that fails in between
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        ids = [log_run(maker.store.root, RUN, uri) for _ in range(2)]
    time.tzset()
    return maker.warehouse, client, ids


def test_it_is_there_once_with_every_parameter_metric_and_the_page(logged, tmp_path):
    warehouse, client, ids = logged
    (run,) = client.search_runs([client.get_experiment_by_name("saap").experiment_id])
    assert ids == [run.info.run_id] * 2
    assert (run.info.status, run.data.tags["saap.run_id"]) == ("FINISHED", RUN)
    assert run.data.params["prune.ratio"] == "0.3"
    assert len(run.data.params) > 60
    for variant, benchmark, value in ask(warehouse, "select variant, benchmark, value from metrics where papers"):
        assert run.data.metrics[f"{variant}/{benchmark}"] == pytest.approx(value)
    for variant, rate in ask(warehouse, "select variant, tokens_per_s from speed"):
        assert run.data.metrics[f"{variant}/tokens_per_s"] == pytest.approx(rate)
    losses = client.get_metric_history(run.info.run_id, "training/loss")
    answer = ask(warehouse, "select step, loss from training order by step")
    assert sorted((point.step, point.value) for point in losses) == [
        (step, pytest.approx(loss)) for step, loss in answer
    ]
    page = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    with open(page, encoding="utf-8") as file:
        assert RUN in file.read()


def test_its_times_are_those_of_the_record_wherever_the_machine_is(logged):
    warehouse, client, ids = logged
    info = client.get_run(ids[0]).info
    (times,) = ask(warehouse, "select epoch_ms(started_at), epoch_ms(finished_at) from runs")
    assert (info.start_time, info.end_time) == pytest.approx(times, abs=1, rel=0)


def test_each_window_of_a_perplexity_is_a_metric(logged):
    warehouse, client, ids = logged
    metrics = client.get_run(ids[0]).data.metrics
    answer = ask(warehouse, "select variant, benchmark, protocol, value, stderr from metrics where not papers")
    assert len(answer) == 3 * 2 * 3
    for variant, benchmark, protocol, *numbers in answer:
        name = f"{variant}/{benchmark}_perplexity_{protocol.rpartition(' ')[2]}"
        assert [metrics[name], metrics[f"{name}_stderr"]] == pytest.approx(numbers)


def test_without_a_place_or_a_run_or_an_answer_it_is_one_line(logged, monkeypatch):
    store = logged[0].root
    refused(saap("export", "mlflow", RUN, "--store", store), "which MLflow?", "sqlite:///mlflow.db")
    refused(saap("export", "mlflow", "none", "--store", store, "--uri", "sqlite:///x.db"), "no such run")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StorageError, match=r"cannot log to MLflow at http://127.0.0.1:9") as raised:
        log_run(store, RUN, "http://127.0.0.1:9")
    assert "\n" not in str(raised.value)


def test_the_command_logs_the_run_it_is_told(logged):
    uri = logged[1].tracking_uri
    done = saap("export", "mlflow", "0aa001", "--store", logged[0].root, "--uri", uri)
    assert (done.returncode, done.stdout) == (0, f"{RUN}: run {logged[2][0]} of MLflow\n"), done.stderr


@pytest.mark.slow
def test_a_run_is_logged_at_its_end_and_not_lost_with_the_server(config, store, prefect_server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = saap("run", config, environment=away)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "MLflow" in line)
    assert "the run is complete, but not in MLflow: cannot log to MLflow at http://127.0.0.1:9" in line
    (run_id,) = all_runs(store)
    assert f"saap export mlflow {run_id} --store {store}" in line

    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = saap("run", config, environment={"MLFLOW_TRACKING_URI": uri})
    assert (done.returncode, "MLflow" in done.stderr) == (0, False), done.stderr
    run_id = all_runs(store)[-1]
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("saap").experiment_id])
    assert (run.info.status, run.data.tags["saap.run_id"]) == ("FINISHED", run_id)
    assert run.data.params["recover.rank"] == "4"
    for variant, value in ask(Warehouse(store), "select variant, value from metrics where benchmark = 'wikitext2'"):
        assert run.data.metrics[f"{variant}/wikitext2_perplexity_32"] == pytest.approx(value)  # not papers' window
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
