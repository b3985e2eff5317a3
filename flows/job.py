"""A run before it starts: its settings and its steps. Does not import Prefect."""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from flows.checks import check_before_start, check_remote
from flows.dag import build
from tasks.config import ConfigError, RunConfig, load_config
from tasks.outside import Outside
from tasks.step import Step


@dataclass(frozen=True)
class Job:
    """A run that can start."""

    settings: RunConfig
    run_id: str
    steps: list[Step]


def title_of(settings: RunConfig) -> str:
    """What Prefect's UI calls the run."""
    return f"{settings.name}: {settings.model.path} at {settings.prune.ratio:g}"


def prepare(settings: RunConfig, *, look_only: bool = False) -> Job:
    """The job of a configuration. What is wrong with it, its model or its data shows here, before anything is computed.

    With look_only, as in `saap plan`, nothing is written and no model downloaded.
    Raises ConfigError, SaapError or StorageError.
    """
    check_remote(settings, look_only=look_only)
    outside = Outside(settings, look_only=look_only)
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    steps = build(settings, run_id, outside)  # first what needs no torch
    check_before_start(settings, outside.model)
    return Job(settings, run_id, steps)


def check_all(config: str, runs: Sequence[Sequence[str]], overrides: Sequence[str]) -> None:
    """Raises ConfigError for a run of a sweep that `prepare` would refuse, naming it: before the first one starts.

    runs: what `combinations` gives. A model and a folder of data that several runs share are looked at once.
    """
    remotes: set[str | None] = set()
    seen: dict[tuple[str | None, ...], Outside] = {}
    for chosen in runs:
        settings = load_config(config, (*chosen, *overrides))
        if settings.store_remote not in remotes:
            check_remote(settings)
            remotes.add(settings.store_remote)
        places = (settings.store, settings.data, settings.model.path, settings.model.revision)
        outside = seen.setdefault(places, Outside(settings))
        try:
            build(settings, outside=outside)
            check_before_start(settings, outside.model)
        except ValueError as error:  # ConfigError, SaapError
            if getattr(error, "exit_code", None) is None:
                raise
            raise ConfigError(f"{', '.join(chosen)}: {error}") from error
