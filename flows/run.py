"""The main job as a Prefect flow."""

from typing import Any

from prefect import Flow, flow, runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.at_work import run_all
from flows.job import Job, prepare, title_of
from flows.markdown import run_markdown
from flows.pages.write import report_file
from flows.report import result_rows, skipped_rows
from storage.artifacts import ArtifactStore
from storage.warehouse import Warehouse
from tasks.config import ConfigError, load_config


def _deployed_title() -> str:
    asked: dict[str, Any] = runtime.flow_run.parameters
    try:
        return title_of(load_config(asked["config"], tuple(asked["overrides"] or ())))
    except ConfigError:  # the flow itself fails by it, and then Prefect shows the line
        return str(asked["config"])


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

    return Flow(run_prepared, name=saap_run.name, flow_run_name=job.title, validate_parameters=False)


def run_job(job: Job) -> str:
    """Make sure the store has the artifacts of all steps, record the run, load the warehouse. Returns the run id."""
    ((run,),) = list(run_all([job]))
    if run.error is not None:
        raise run.error
    show_results(job)
    return job.run_id


def show_results(job: Job) -> None:
    """The result table and the run's page as artifacts in Prefect's UI."""
    store = ArtifactStore(job.settings.store)
    with Warehouse(store.root).reading() as connection:
        columns, rows = result_rows(connection, job.run_id)
        skipped = "".join(f"\n\nSkipped {benchmark}: {why}" for benchmark, why in skipped_rows(connection, job.run_id))
        about = run_markdown(store.root, connection, job.run_id)
    create_table_artifact(
        [dict(zip(columns, row, strict=True)) for row in rows], key="results", description=f"Run {job.run_id}{skipped}"
    )
    create_markdown_artifact(about, key="run")
    create_link_artifact(report_file(store.root, job.run_id).as_uri(), link_text="report", key="report")
