"""What stages take and publish."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """What a stage publishes, or something like it from outside the store. A subclass says how it is read."""

    place: Path

    def read(self) -> Any:
        """What later stages use of it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Source:
    """Where an input comes from: an artifact of the store (stage and key), or a path outside it."""

    kind: type[Artifact]
    stage: str = ""
    key: str = ""
    path: str = ""
