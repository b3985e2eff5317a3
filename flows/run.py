"""The main job as a Prefect flow: every stage a task, found in the store or made now."""

import datetime
import uuid
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from prefect.states import State

from flows.dag import build
from flows.report import result_rows, skipped_rows
from storage.artifacts import ArtifactStore
from storage.runs import RunRecord, mark_killed
from storage.warehouse import Warehouse
from tasks.activations import activations
from tasks.calibrate import calibrate
from tasks.config import load_config
from tasks.data import MissingData
from tasks.evaluate import evaluate
from tasks.fisher import fisher
from tasks.fluctuation import fluctuation
from tasks.fuse import fuse
from tasks.gradients import gradients
from tasks.model import model
from tasks.prune import prune
from tasks.rank import rank
from tasks.recover import recover
from tasks.score import score
from tasks.speed import speed
from tasks.step import Step

_TASKS = (
    model,
    calibrate,
    score,
    fuse,
    fluctuation,
    gradients,
    activations,
    fisher,
    rank,
    prune,
    recover,
    evaluate,
    speed,
)
TASKS = {task.name: task for task in _TASKS}


def _flow_run_name() -> str:
    parameters: dict[str, Any] = runtime.flow_run.parameters
    config = load_config(parameters["config"], tuple(parameters["overrides"] or ()))
    return f"{config.name}: {config.model.path} at {config.prune.ratio:g}"


def _run_task(store: ArtifactStore, step: Step) -> str | None:
    """Have the step's artifact in the store. Returns why, when a benchmark's data could not be had."""
    # Prefect's cache knows that the stage was done, only the store knows that its artifact is still there
    there = store.find(step.stage, step.key) is not None
    state: State = TASKS[step.stage].with_options(refresh_cache=not there)(step, return_state=True)
    try:
        state.result()
    except MissingData as missing:
        if step.stage != "evaluate":
            raise
        return str(missing)
    return None


@flow(name="saap", flow_run_name=_flow_run_name, validate_parameters=False)
def saap_run(config: str | None = None, overrides: list[str] | None = None) -> str:
    """Run every stage of a configuration and return the run id.

    config: path of a TOML file (the defaults when absent); overrides: 'section.field=value', as with `--set`.
    """
    settings = load_config(config, tuple(overrides or ()))
    store = ArtifactStore(settings.store)
    store.prepare()
    warehouse = Warehouse(store.root)
    for dead in mark_killed(store.root):
        warehouse.load(dead)
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    steps = build(settings, run_id)
    record = RunRecord(
        store.root,
        run_id,
        name=settings.name,
        model=settings.model.path,
        data=settings.data,
        criterion=settings.criterion.name,
        ratio=settings.prune.ratio,
        config=settings.model_dump_json(),
    )
    try:
        warehouse.load(run_id)
        for position, step in enumerate(steps):
            about = {"stage": step.stage, "variant": step.variant, "benchmark": step.benchmark, "key": step.key}
            if (missing := step.missing or _run_task(store, step)) is not None:
                get_run_logger().warning("%s skipped: %s", step.label, missing)
                record.stage(position, **about, cached=False, seconds=None, skipped=missing)
            else:
                manifest = store.find(step.stage, step.key)
                assert manifest is not None
                record.stage(
                    position, **about, cached=manifest["run_id"] != run_id, seconds=manifest["seconds"], skipped=None
                )
            warehouse.load(run_id)
    except BaseException as error:
        record.finish("failed", str(error) or type(error).__name__)
        warehouse.load(run_id)
        raise
    record.finish("completed")
    warehouse.load(run_id)
    columns, rows = result_rows(store.root, run_id)
    skipped = "".join(f"\n\nSkipped {benchmark}: {why}" for benchmark, why in skipped_rows(store.root, run_id))
    create_table_artifact(
        [dict(zip(columns, row, strict=True)) for row in rows], key="results", description=f"Run {run_id}{skipped}"
    )
    return run_id
