"""What a stage is. Each has a file of its own, `tasks/stages/<name>.py`. Imports neither Prefect nor torch."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tasks.artifact import Artifact, Source
from tasks.config import RunConfig
from tasks.outside import Outside
from tasks.step import Step

Summary = dict[str, Any]


@dataclass
class Stage:
    """One stage of a run.

    version: raised when the code starts to give other results; its artifacts, and all after them, are made anew.
    takes: the inputs by name and kind, read off the signature of `make`. params: its own part of the configuration.
    fingerprint: of what it takes from outside the store. make: fills a folder and returns a small summary.
    """

    name: str
    version: int
    publishes: type[Artifact]
    takes: Mapping[str, type[Artifact]]
    params: Callable[..., dict[str, Any]]
    fingerprint: Callable[..., str | None]
    make: Callable[..., Summary]

    def check(self, inputs: Mapping[str, Source]) -> None:
        """Raises TypeError for an input the stage does not take, or one of another kind."""
        for name, source in inputs.items():
            if name not in self.takes or not issubclass(source.kind, self.takes[name]):
                raise TypeError(f"{self.name} takes {dict(self.takes)}, not {source.kind.__name__} as {name}")

    def run(self, step: Step, folder: Path) -> Summary:
        """Make the artifact of a step in an empty folder."""
        inputs = {name: kind(step.place(name)) for name, kind in self.takes.items() if step.has(name)}
        return self.make(step, folder, **inputs)


def stage(
    *,
    version: int,
    publishes: type[Artifact],
    params: Callable[..., dict[str, Any]],
    fingerprint: Callable[..., str | None] = lambda outside, inputs: None,
) -> Callable[[Callable[..., Summary]], Stage]:
    """Make a Stage of a function (step, folder, *, inputs …) -> summary; an input may be absent if its default is None.

    params takes the RunConfig, fingerprint the `Outside` and the inputs (name → Source); both also take the labels of
    a stage that a run has several times.
    """

    def decorate(make: Callable[..., Summary]) -> Stage:
        hints = get_type_hints(make)
        takes = {
            name: next(kind for kind in (*get_args(hints[name]), hints[name]) if kind is not type(None))
            for name, parameter in inspect.signature(make).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        return Stage(make.__name__, version, publishes, takes, params, fingerprint, make)

    return decorate


def stage_named(name: str) -> Stage:
    """The stage in `tasks/stages/<name>.py`."""
    found: Stage = getattr(importlib.import_module(f"tasks.stages.{name}"), name)
    return found


def dtype_of(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that every stage with a model has in its key."""
    return {"dtype": config.model.dtype}


def groups_of(config: RunConfig) -> dict[str, Any]:
    """The same for stages with coupled groups in their result, plus the group of attention, if not the default."""
    return dtype_of(config) | ({"heads": "query"} if config.prune.heads == "query" else {})


def weights_of(outside: Outside, inputs: Mapping[str, Source]) -> str:
    """The fingerprint of stages that take the dense model."""
    return outside.model.weights
