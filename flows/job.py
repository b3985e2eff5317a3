"""A run before it starts: its settings and its steps. Imports neither torch nor Prefect."""

import datetime
import uuid
from dataclasses import dataclass

from flows.dag import build
from tasks.config import RunConfig
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
    """The job of a configuration. What is wrong with its model or its data shows here.

    Raises ConfigError or StorageError.
    """
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    return Job(settings, run_id, build(settings, run_id))
