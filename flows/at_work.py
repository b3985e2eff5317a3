"""Runs at work: their records, their pages, and how they end."""

import itertools
import os
import time
from collections.abc import Generator, Sequence
from typing import Any

from prefect import get_run_logger, runtime

from flows.graph import Graph, Outcome, Reference
from flows.job import Job, whose
from flows.killed import tell_of_the_killed
from flows.pages.render import write
from flows.pages.write import page_of_run, report_file
from flows.places import place_for
from flows.progress import IN_STORE
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.hints import in_store
from storage.remote import remote_of
from storage.runs import RunRecord
from storage.warehouse import Warehouse
from tasks.running import what_came
from tasks.step import Step

PAGE_SECONDS = 20.0  # between two pages of a run that goes on: one takes a second to draw


class Run:
    """A run: its record from its first step on, the steps it still waits for, and the error that ended it."""

    def __init__(self, job: Job, store: ArtifactStore) -> None:
        self.job, self._store = job, store
        self.error: BaseException | None = None
        self.tickets: list[Any] = []  # of the steps that were made for it or others of its sweep
        self._left: dict[Reference, int] = {step.reference: at for at, step in enumerate(job.steps)}
        self._record: RunRecord | None = None
        self._known: dict[int, dict[str, Any]] = {}  # of the record that is not there yet

    @property
    def ended(self) -> bool:
        return self.error is not None or not self._left

    def settle(self, reference: Reference, outcome: Outcome) -> None:
        """Take down what became of one of its steps, if it needs it."""
        if self.ended or reference not in self._left:
            return
        if outcome.error is not None:
            self.error = outcome.error
            return
        at = self._left.pop(reference)
        step, manifest = self.job.steps[at], outcome.manifest
        about: dict[str, Any] = {
            "stage": step.stage,
            "variant": step.variant,
            "benchmark": step.benchmark,
            "key": step.key,
        }
        if manifest is None:
            about |= {"cached": False, "seconds": None, "skipped": outcome.skipped}
        else:
            cached = manifest["run_id"] != step.run_id
            about |= {"cached": cached, "seconds": manifest["seconds"], "skipped": None}
        if outcome.ticket is not None:
            self.tickets.append(outcome.ticket)
        if self._record is None:
            self._known[at] = about
        else:
            self._record.stage(at, **about)

    def begin(self) -> None:
        """Write the record, and hold it."""
        if self._record is not None:
            return
        settings = self.job.settings
        self._record = RunRecord(
            self._store.root,
            self.job.run_id,
            name=settings.name,
            model=settings.model.path,
            data=settings.data,
            criterion=settings.criterion.name,
            ratio=settings.prune.ratio,
            config=settings.model_dump_json(),
            flow_run=runtime.flow_run.id,
        )
        for at, about in self._known.items():
            self._record.stage(at, **about)

    def finish(self, error: BaseException | None = None) -> None:
        """The record's end."""
        self.error = self.error or error
        self.begin()
        assert self._record is not None
        if self.error is None:
            self._record.finish("completed")
        else:
            why = "interrupted" if isinstance(self.error, KeyboardInterrupt) else type(self.error).__name__
            self._record.finish("failed", str(self.error) or why)

    def share(self) -> None:
        """Copy a completed run to the remote store. Where that fails the run is complete, and its command is not."""
        url = self.job.settings.store_remote
        if url is None or self.error is not None:
            return
        try:
            remote_of(url).push(self._store, self.job.run_id)
        except StorageError as error:
            self.error = error

    def track(self) -> None:
        """Log a completed run to MLflow, where MLFLOW_TRACKING_URI says which. Where that fails it is complete too."""
        if self.error is None and os.environ.get("MLFLOW_TRACKING_URI"):
            from flows.tracking import log_run

            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's 7 take four minutes
            try:
                there = log_run(self._store.root, self.job.run_id)
            except Exception as error:
                why = str(error).partition("\n")[0] or type(error).__name__
                get_run_logger().warning(
                    "the run is complete, but not in MLflow: %s; saap export mlflow %s %s",
                    *(why, self.job.run_id, in_store(self._store.root)),
                )
            else:
                get_run_logger().info("logged to MLflow as run %s", there)

    def page_is_due(self, step: Step, told: float) -> bool:
        """Whether its page is written now that it made this step: not too often, and before a training begins."""
        trains = step.stage == "prune" and self.job.settings.recover.recipe != "none"
        return trains or time.monotonic() - told > PAGE_SECONDS

    def interrupt(self, error: BaseException) -> bool:
        """The record's end, if it has begun and not ended. Returns whether."""
        if self._record is None or self._record.finished:
            return False
        self.finish(error)
        return True


def run_all(jobs: Sequence[Job]) -> Generator[list[Run], None, None]:
    """Do the work of some runs, and give those that have ended, several where they end at once.

    Their records are then written, the warehouse and their pages up to date. A run that failed has its error.
    """
    store = ArtifactStore(jobs[0].settings.store)
    store.prepare()
    warehouse = Warehouse(store.root)
    warehouse.sync()
    tell_of_the_killed(store.root)
    runs = {job.run_id: Run(job, store) for job in jobs}
    graph, log, told = Graph(jobs), get_run_logger(), time.monotonic()
    its_runs = {step: those for step, those in whose(jobs).items() if len(graph.needed[step]) < len(jobs)}

    def begin(run_id: str) -> None:
        if run_id in runs:  # not one that failed while others need its step
            runs[run_id].begin()

    try:
        with place_for(jobs[0].settings.execute) as place:
            for settled in graph.work_off(store, place, begin):
                for step, outcome in settled:
                    _say(log, step, outcome, its_runs.get(step.reference, ""))
                    for run_id in graph.needed[step.reference] & runs.keys():
                        runs[run_id].settle(step.reference, outcome)
                if over := [run for run in runs.values() if run.ended]:
                    for run in over:
                        run.finish()
                        del runs[run.job.run_id]
                    _tell(warehouse, [run.job.run_id for run in over])
                    for run in over:
                        run.share()
                        run.track()
                    yield over
                elif (its := runs.get(step.run_id)) and outcome.ticket is not None and its.page_is_due(step, told):
                    _tell(warehouse, [step.run_id])
                    told = time.monotonic()
    except BaseException as error:
        if broken := [run_id for run_id, run in runs.items() if run.interrupt(error)]:
            _tell(warehouse, broken)
        raise


def _say(log: Any, step: Step, outcome: Outcome, its_runs: str) -> None:
    """One line for the log and the screen; flows/progress.py reads it there.

    its_runs: which ones of a sweep need the step, where not all do.
    """
    if outcome.error is not None:
        log.info("%s failed: %s", step.label, outcome.error, extra={"failed": True, "its_runs": its_runs})
    elif outcome.skipped is not None:
        log.warning("%s skipped: %s", step.label, outcome.skipped)
    elif outcome.manifest is not None:
        if outcome.ticket is None:
            summary, seconds = IN_STORE, 0.0
        else:
            fetched = step.store_remote is not None and outcome.manifest["run_id"] != step.run_id
            summary = what_came(outcome.manifest["summary"], fetched)
            seconds = 0.0 if fetched else outcome.manifest["seconds"]
        log.info("%s: %s", step.label, summary, extra={"seconds": seconds, "its_runs": its_runs})


def _tell(warehouse: Warehouse, run_ids: Sequence[str]) -> None:
    """Bring the warehouse and the pages of some runs up to date. A page that cannot be made does not end a run."""
    if len(run_ids) == 1:
        warehouse.load(run_ids[0])
    else:
        warehouse.sync()
    left = iter(run_ids)
    for first in left:
        run_id = first
        try:
            with warehouse.reading() as connection:  # for all, as long as no page fails
                for run_id in itertools.chain([first], left):
                    write(report_file(warehouse.root, run_id), page_of_run(warehouse, connection, run_id))
        except Exception as error:
            get_run_logger().warning("no page of run %s: %s: %s", run_id, type(error).__name__, error)
