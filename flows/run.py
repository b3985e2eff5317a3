"""The main job as a Prefect flow: every step a task, found in the store or made now."""

import time
from functools import cache
from typing import Any

from prefect import Flow, Task, flow, get_run_logger, runtime
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.states import State

from flows.job import Job, prepare, title_of
from flows.pages.write import report_file, write_report
from flows.report import result_rows, skipped_rows
from storage.artifacts import ArtifactStore
from storage.remote import remote_of
from storage.runs import RunRecord
from storage.warehouse import Warehouse
from tasks.config import load_config
from tasks.data import MissingData
from tasks.running import task_of
from tasks.stage import stage_named
from tasks.step import Step

PAGE_SECONDS = 20.0  # between two pages of a run that goes on: one takes a second to draw


def _deployed_title() -> str:
    asked: dict[str, Any] = runtime.flow_run.parameters
    return title_of(load_config(asked["config"], tuple(asked["overrides"] or ())))


@flow(name="saap", flow_run_name=_deployed_title, validate_parameters=False)
def saap_run(config: str | None = None, overrides: list[str] | None = None) -> str:
    """Run every stage of a configuration and return the run id.

    config: path of a TOML file (the defaults when absent); overrides: 'section.field=value', as with `--set`.
    """
    return run_job(prepare(load_config(config, tuple(overrides or ()))))


def flow_of(job: Job) -> Flow[[str | None, list[str]], str]:
    """`saap_run` for a job that is prepared already, under its title. Its arguments are for Prefect's UI only."""

    def run_prepared(config: str | None, overrides: list[str]) -> str:
        return run_job(job)

    return Flow(run_prepared, name=saap_run.name, flow_run_name=title_of(job.settings), validate_parameters=False)


def run_job(job: Job) -> str:
    """Make sure the store has the artifacts of all steps, record the run, load the warehouse. Returns the run id."""
    store = ArtifactStore(job.settings.store)
    store.prepare()
    warehouse = Warehouse(store.root)
    warehouse.sync()
    settings = job.settings
    record = RunRecord(
        store.root,
        job.run_id,
        name=settings.name,
        model=settings.model.path,
        data=settings.data,
        criterion=settings.criterion.name,
        ratio=settings.prune.ratio,
        config=settings.model_dump_json(),
    )
    try:
        warehouse.load(job.run_id)
        for position, step in enumerate(job.steps):
            if _run_step(store, record, position, step):
                _tell(warehouse, job.run_id, going_on=True)
    except BaseException as error:
        record.finish("failed", str(error) or type(error).__name__)
        _tell(warehouse, job.run_id)
        raise
    record.finish("completed")
    _tell(warehouse, job.run_id)
    if settings.store_remote is not None:
        remote_of(settings.store_remote).push(store, job.run_id)
    _show_results(store, job.run_id)
    return job.run_id


def _tell(warehouse: Warehouse, run_id: str, *, going_on: bool = False) -> None:
    """Bring the warehouse and the run's page up to date; of a run that goes on the page is written now and then.

    A page that cannot be made does not end a run.
    """
    warehouse.load(run_id)
    page = report_file(warehouse.root, run_id)
    if going_on and page.is_file() and time.time() - page.stat().st_mtime < PAGE_SECONDS:
        return
    try:
        write_report(warehouse.root, run_id)
    except Exception as error:
        get_run_logger().warning("no page of this run: %s: %s", type(error).__name__, error)


def _run_step(store: ArtifactStore, record: RunRecord, position: int, step: Step) -> bool:
    """Make sure the store has the step's artifact, and record it, or why not. Returns whether it was made now."""
    about = {"stage": step.stage, "variant": step.variant, "benchmark": step.benchmark, "key": step.key}
    missing = step.missing or _call_task(store, step)
    if missing is not None:
        get_run_logger().warning("%s skipped: %s", step.label, missing)
        record.stage(position, **about, cached=False, seconds=None, skipped=missing)
        return False
    manifest = store.find(step.stage, step.key)
    assert manifest is not None
    cached = manifest["run_id"] != step.run_id
    record.stage(position, **about, cached=cached, seconds=manifest["seconds"], skipped=None)
    return not cached


def _call_task(store: ArtifactStore, step: Step) -> str | None:
    """Returns the reason when a benchmark's data is not available."""
    # Prefect's cache remembers that the stage was done; only the store shows that its artifact is still there
    there = store.find(step.stage, step.key) is not None
    state: State = _task(step.stage).with_options(refresh_cache=not there)(step, return_state=True)
    try:
        state.result()
    except MissingData as missing:
        if step.stage != "evaluate":
            raise
        return str(missing)
    return None


@cache
def _task(stage: str) -> Task[[Step], dict[str, Any]]:
    return task_of(stage_named(stage))


def _show_results(store: ArtifactStore, run_id: str) -> None:
    """The result table and the run's page as artifacts in Prefect's UI."""
    columns, rows = result_rows(store.root, run_id)
    skipped = "".join(f"\n\nSkipped {benchmark}: {why}" for benchmark, why in skipped_rows(store.root, run_id))
    create_table_artifact(
        [dict(zip(columns, row, strict=True)) for row in rows], key="results", description=f"Run {run_id}{skipped}"
    )
    create_link_artifact(report_file(store.root, run_id).as_uri(), link_text="report", key="report")
