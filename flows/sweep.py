"""Many runs of one configuration as one graph: every combination of the values of a [sweep] table."""

from contextlib import closing
from pathlib import Path

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.at_work import Run, run_all
from flows.combinations import combinations
from flows.job import Job, prepare_all
from flows.markdown import sweep_markdown
from flows.run import saap_run, show_results
from flows.targets import sweep_page, write_sweep_of_file
from tasks.config import ConfigError


@flow(name="saap-sweep", validate_parameters=False)
def saap_sweep(config: str, overrides: list[str] | None = None) -> list[str]:
    """Run every combination; what they share is computed once. Returns the run ids.

    What can be known before is checked for all runs first. A step that fails fails the runs that need it and no others;
    the sweep then fails at the end, naming how many did.
    """
    overrides = overrides or []
    return sweep_jobs(config, overrides, prepare_all(config, combinations(config, overrides), overrides))


def sweep_of(jobs: list[Job]) -> Flow[[str, list[str]], list[str]]:
    """`saap_sweep` for jobs that are prepared already. Its arguments are for Prefect's UI only."""

    def sweep_prepared(config: str, overrides: list[str]) -> list[str]:
        return sweep_jobs(config, overrides, jobs)

    return Flow(sweep_prepared, name=saap_sweep.name, validate_parameters=False)


def sweep_jobs(config: str, overrides: list[str], jobs: list[Job]) -> list[str]:
    """Do the work of all jobs; each gets a flow run when it ends. Writes the sweep's page, also where runs failed.

    Returns the ids of the completed runs.
    """
    failed: dict[str, list[str]] = {}  # by the reason
    # a flow run of a moment needs no heartbeat, whose thread would end up to a second later
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), closing(run_all(jobs)) as batches:
        for run in (run for batch in batches for run in batch):
            _flow_of(run)(config, [*run.job.chosen, *overrides], return_state=True, wait_for=run.tickets)
            if run.error is not None:
                failed.setdefault(str(run.error), []).append(", ".join(run.job.chosen))
    page = write_sweep_of_file(Path(config), tuple(overrides), sweep_page(jobs[0].settings.store, config))
    create_markdown_artifact(sweep_markdown(config, tuple(overrides), jobs, page.resolve()), key="sweep")
    if failed:
        count = sum(map(len, failed.values()))
        reasons = "; ".join(f"{_some(runs)}: {why}" for why, runs in failed.items())
        raise ConfigError(f"{count} of {len(jobs)} runs failed: {reasons}"[:1000])
    return [job.run_id for job in jobs]


def _flow_of(run: Run) -> Flow[[str, list[str]], str]:
    """A run that has ended as a flow run: it waited for its steps, shows the results, or fails as the run did."""

    def end(config: str, overrides: list[str]) -> str:
        if run.error is not None:
            raise run.error
        show_results(run.job)
        return run.job.run_id

    return Flow(end, name=saap_run.name, flow_run_name=run.job.title, validate_parameters=False)


def _some(runs: list[str]) -> str:
    shown = " and ".join(runs[:2])
    return f"{shown} and {len(runs) - 2} more" if len(runs) > 2 else shown
