"""One stage to run, as the flow gives it to a task. Plain strings, so that Prefect's hash of it never varies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.artifacts import ArtifactStore


@dataclass(frozen=True)
class Step:
    """stage and key name the artifact; inputs are (name, stage, key) of the artifacts it takes.

    outside: (name, path) of what comes from outside the store: model, tokenizer, data.
    params: the stage's own part of the config, compute: how to do the work, both as JSON.
    looked_at: `Outside.looked_at` of what comes from outside. missing: why the step cannot be done and is skipped, and
    what helps.
    """

    stage: str
    key: str
    params: str
    inputs: tuple[tuple[str, str, str], ...]
    outside: tuple[tuple[str, str], ...]
    compute: str
    store: str
    run_id: str = ""
    variant: str | None = None
    benchmark: str | None = None
    missing: str | None = None
    store_remote: str | None = None
    looked_at: str = ""

    @property
    def reference(self) -> tuple[str, str]:
        """(stage, key): two steps with the same are one piece of work."""
        return self.stage, self.key

    @property
    def label(self) -> str:
        """What people see: 'score', 'evaluate pruned boolq'."""
        return " ".join(part for part in (self.stage, self.variant, self.benchmark) if part)

    def config(self) -> dict[str, Any]:
        """The stage's own part of the configuration."""
        values: dict[str, Any] = json.loads(self.params)
        return values

    def place(self, name: str) -> Path:
        """Where an input lies: an artifact of the store, or something from outside."""
        for input_name, stage, key in self.inputs:
            if input_name == name:
                return ArtifactStore(self.store).path(stage, key)
        return Path(dict(self.outside)[name])

    def has(self, name: str) -> bool:
        return any(name == found for found, *_ in (*self.inputs, *self.outside))
