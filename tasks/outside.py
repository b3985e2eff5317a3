"""What a run takes from outside the store, and its fingerprints."""

import json
import socket
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from storage.keys import Fingerprints
from tasks.config import RunConfig
from tasks.data import SUFFIXES, Found, MissingData, find_data, is_texts
from tasks.model_source import ModelSource, model_source
from tasks.toml import ConfigError


class Outside:
    """The model and the data sets of a configuration; each is looked at once, and only when it is asked for.

    With look_only nothing is written and no model downloaded.
    """

    def __init__(self, config: RunConfig, *, look_only: bool = False) -> None:
        self._config = config
        self._fingerprints = Fingerprints(Path(config.store).resolve(), look_only=look_only)
        self._data: dict[str, Found | MissingData] = {}
        self._told: dict[tuple[frozenset[str], int], str] = {}  # what `looked_at` said

    @cached_property
    def model(self) -> ModelSource:
        """Raises ConfigError or StorageError for a model that is not there."""
        return model_source(self._config.model.path, self._config.model.revision, self._fingerprints)

    def data(self, role: str) -> str:
        """The fingerprint of a role's data, or of 'prose' to recover on. Raises MissingData when it is not there."""
        return self._found(role).fingerprint

    def place(self, role: str) -> str:
        """Where a role's data is: 'mini', an absolute path, or the hub at one commit; '' for data that is missing."""
        return "" if self.missing(role) else self._found(role).place

    def rows(self, role: str) -> int | None:
        """How many rows a role's data has; None for data that is missing or still on the hub."""
        return None if self.missing(role) else self._found(role).rows

    def _found(self, role: str) -> Found:
        if role not in self._data:
            try:
                self._data[role] = self._find(role)
            except MissingData as missing:
                self._data[role] = missing
        found = self._data[role]
        if isinstance(found, MissingData):
            raise found
        return found

    def _find(self, role: str) -> Found:
        data, prose_from = self._config.data, self._config.recover.prose_from
        if role == "prose" and prose_from is not None:
            data, place = prose_from, Path(prose_from)
            if data not in ("mini", "hub") and not (place.is_dir() or is_texts(place)):
                wrong = f"is none of {', '.join(SUFFIXES)}" if place.exists() else f"does not exist in {Path.cwd()}"
                raise ConfigError(
                    f"recover.prose_from = '{data}' {wrong}: give a file of texts, a data folder, 'mini' or 'hub'"
                )
        elif is_texts(Path(data)):
            raise ConfigError(f"data = '{data}' is a file: give the folder of the data sets, 'mini' or 'hub'")
        role = "calibration" if role == "prose" else role
        return find_data(data if data in ("mini", "hub") else str(Path(data).resolve()), role, self._fingerprints)

    def looked_at(self, places: Collection[str]) -> str:
        """This host and the sizes and times of the files there that were fingerprinted, as JSON."""
        found = self._fingerprints.looked_at
        asked = frozenset(places), len(found)
        if asked not in self._told:
            files = {
                path: about
                for path, about in found.items()
                if any(path == place or path.startswith(f"{place}/") for place in places if place)
            }
            self._told[asked] = json.dumps({"host": socket.gethostname(), "files": files})
        return self._told[asked]

    def missing(self, role: str) -> str | None:
        """Why a role's data cannot be had and what helps; None when it is there."""
        try:
            self.data(role)
        except MissingData as missing:
            return str(missing)
        return None


class SharedOutside:
    """The model and data sets of many configurations: those that several have in common are looked at once."""

    def __init__(self, *, look_only: bool = False) -> None:
        self._look_only = look_only
        self._seen: dict[tuple[str | None, ...], Outside] = {}

    def of(self, config: RunConfig) -> Outside:
        places = (config.store, config.data, config.recover.prose_from, config.model.path, config.model.revision)
        if places not in self._seen:
            self._seen[places] = Outside(config, look_only=self._look_only)
        return self._seen[places]
