"""Runs before they start: their settings and their steps. Does not import Prefect."""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from flows.checks import check_before_start, check_remote
from flows.dag import build
from flows.to_ratio import with_ratio
from storage.artifacts import ArtifactStore
from tasks.config import ConfigError, RunConfig, load_config
from tasks.outside import Outside, SharedOutside
from tasks.step import Step


@dataclass(frozen=True)
class Job:
    """A run that can start. chosen: the overrides that tell it from the other runs of its sweep."""

    settings: RunConfig
    run_id: str
    steps: list[Step]
    chosen: tuple[str, ...] = ()

    def title(self) -> str:
        """`title_of` the run, for Prefect to call: in a text it would fill in braces."""
        return title_of(self.settings)


def title_of(settings: RunConfig) -> str:
    """What Prefect's UI calls the run."""
    return f"{settings.name}: {settings.model.path} at {settings.prune.target or f'{settings.prune.ratio:g}'}"


def prepare(settings: RunConfig, *, look_only: bool = False) -> Job:
    """The job of a configuration. What is wrong with it, its model or its data shows here, before anything is computed.

    With look_only, as in `saap plan`, nothing is written and no model downloaded.
    Raises ConfigError, SaapError or StorageError.
    """
    check_remote(settings, look_only=look_only)
    return _job(settings, Outside(settings, look_only=look_only), look_only=look_only)


def _job(settings: RunConfig, outside: Outside, chosen: tuple[str, ...] = (), *, look_only: bool = False) -> Job:
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    if settings.prune.target is not None:
        build(settings, run_id, outside)  # the layers are timed only for a run whose data is there
        check_before_start(settings, outside.model)
        settings = with_ratio(settings, outside, run_id, look_only=look_only)
    steps = build(settings, run_id, outside)  # first what needs no torch
    if look_only or work_left(steps):
        check_before_start(settings, outside.model)
    return Job(settings, run_id, steps, chosen)


def work_left(steps: Sequence[Step]) -> bool:
    """Whether there is anything to compute; if not, neither torch nor a model is needed."""
    store = ArtifactStore(steps[0].store)
    return any(step.missing is None and store.inspect(step.stage, step.key)[0] is None for step in steps)


def prepare_all(
    config: str, runs: Sequence[Sequence[str]], overrides: Sequence[str], *, look_only: bool = False
) -> list[Job]:
    """The jobs of a sweep. Raises ConfigError for a run that `prepare` would refuse, naming it.

    runs: what `combinations` gives. A model and a folder of data that several runs share are looked at once.
    """
    outside = SharedOutside(look_only=look_only)
    jobs: list[Job] = []
    for chosen in runs:
        settings = load_config(config, (*chosen, *overrides))
        if not jobs:  # the others have the same remote store
            check_remote(settings, look_only=look_only)
        try:
            jobs.append(_job(settings, outside.of(settings), tuple(chosen), look_only=look_only))
        except ValueError as error:  # ConfigError, SaapError
            if getattr(error, "exit_code", None) is None:
                raise
            raise ConfigError(f"{', '.join(chosen)}: {error}") from error
    return jobs


def whose(jobs: Sequence[Job]) -> dict[tuple[str, str], str]:
    """Which runs of a sweep need each of its steps: the values of the only one, or how many."""
    needed: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        for step in job.steps:
            needed.setdefault(step.reference, []).append(job)
    return {
        reference: f"{len(those)} of {len(jobs)} runs"
        if len(those) > 1 or len(jobs) == 1
        else ", ".join(one.partition("=")[2] for one in those[0].chosen)
        for reference, those in needed.items()
    }
