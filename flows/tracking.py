"""A run of ours as one in MLflow: the configuration as parameters, numbers as metrics, the page as an artifact."""

import json
import math
import os
import tempfile
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.pages.run_head import flat_fields
from flows.pages.section import ask
from flows.pages.write import write_report
from storage.errors import StorageError
from storage.warehouse import Warehouse

EXPERIMENT, TAG = "saap", "saap.run_id"
LONGEST, BATCH = 6000, 1000  # characters of a parameter, metrics in one call: MLflow's own limits
_STATUS = {"completed": "FINISHED", "failed": "FAILED", "killed": "KILLED", "running": "RUNNING"}
_MEASURED = r"""
select variant, benchmark, metric, value, stderr, papers, regexp_extract(protocol, 'windows of (\d+)', 1) as length
from metrics where run_id = ? order by all"""
_SPEEDS = """
select variant, parameters, active_parameters, weight_bytes, tokens_per_s, decode_ratio, prefill_tokens_per_s,
    peak_bytes
from speed where run_id = ?"""
_TRAINING = "select step, loss, held_out_loss, learning_rate from training where run_id = ? order by step"


def log_run(store: Path, run_id: str, uri: str | None = None) -> str:
    """Write a run into MLflow and return its id there; a run that is there already keeps its id.

    uri: the tracking server or database, MLFLOW_TRACKING_URI when absent. The experiment is MLFLOW_EXPERIMENT_NAME, or
    'saap'. Raises StorageError when MLflow is not installed, cannot be reached, or nobody says where it is.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise StorageError("which MLflow? --uri sqlite:///mlflow.db or http://server:5000, or set MLFLOW_TRACKING_URI")
    if find_spec("mlflow") is None:
        raise StorageError("MLflow is not installed: pip install -c constraints.txt 'saap[mlflow]'")
    with Warehouse(store).reading() as connection:
        (run,) = ask(connection, "select * from runs where run_id = ?", run_id)
        metrics = _metrics(connection, run_id)
        history = ask(connection, _TRAINING, run_id)
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory(prefix="saap-") as folder:  # the store may be one to read only
            return _log(uri, run, metrics, history, write_report(store, run_id, Path(folder) / "report.html"))
    except StorageError:
        raise
    except (MlflowException, OSError) as error:
        raise StorageError(f"cannot log to MLflow at {uri}: {str(error).splitlines()[0][:300]}") from error


def _metrics(connection: Any, run_id: str) -> dict[str, float]:
    """'pruned/wikitext2' and the like; what the papers do not show says what it is: 'pruned/wikitext2_perplexity_2048'.

    No name goes on where another ends: MLflow's file store has a file for the one and a folder for the other.
    """
    found: dict[str, float] = {}
    for row in ask(connection, _MEASURED, run_id):
        more = [] if row["papers"] else [row["metric"], *([row["length"]] if row["length"] else [])]
        name = "_".join([f"{row['variant']}/{row['benchmark']}", *more])
        found[name] = row["value"]
        found |= {} if row["stderr"] is None else {f"{name}_stderr": row["stderr"]}
    for row in ask(connection, _SPEEDS, run_id):
        variant = row.pop("variant")
        found |= {f"{variant}/{name}": float(value) for name, value in row.items() if value is not None}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _milliseconds(time: datetime) -> int:
    """Since 1970, of a time in UTC that does not say so, as the warehouse has them."""
    return int(time.replace(tzinfo=UTC).timestamp() * 1000)


def _log(uri: str, run: dict[str, Any], metrics: dict[str, float], history: list[dict[str, Any]], page: Path) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    for there in client.search_runs([experiment_id], f"tags.`{TAG}` = '{run['run_id']}'"):
        if there.info.status != "RUNNING":
            return str(there.info.run_id)
        client.delete_run(there.info.run_id)  # the server failed while it was written
    started, finished = (_milliseconds(time) for time in (run["started_at"], run["finished_at"] or run["started_at"]))
    made = client.create_run(experiment_id, start_time=started, tags={TAG: run["run_id"]}, run_name=run["name"])
    mlflow_id = str(made.info.run_id)
    fields = flat_fields(json.loads(run["config"]))
    params = [Param(field, json.dumps(value)[:LONGEST]) for field, value in fields.items()]
    points = [Metric(measure, value, finished, 0) for measure, value in metrics.items()]
    points += [
        Metric(f"training/{measure}", row[measure], finished, row["step"])
        for row in history
        for measure in ("loss", "held_out_loss", "learning_rate")
        if row[measure] is not None and math.isfinite(row[measure])
    ]
    for first in range(0, len(params), 100):
        client.log_batch(mlflow_id, params=params[first : first + 100])
    for first in range(0, len(points), BATCH):
        client.log_batch(mlflow_id, metrics=points[first : first + BATCH])
    client.log_artifact(mlflow_id, str(page))
    client.set_terminated(mlflow_id, _STATUS[run["status"]], finished)
    return mlflow_id
