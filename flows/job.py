"""A run before it starts: its settings and its steps. Does not import Prefect."""

import datetime
import uuid
from dataclasses import dataclass

from flows.checks import check_before_start
from flows.dag import build
from tasks.config import RunConfig
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


def prepare(settings: RunConfig) -> Job:
    """The job of a configuration. What is wrong with it, its model or its data shows here, before anything is computed.

    Raises ConfigError, SaapError or StorageError.
    """
    outside = Outside(settings)
    check_before_start(settings, outside.model)
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    return Job(settings, run_id, build(settings, run_id, outside))
