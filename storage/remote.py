"""A store that several hosts share, in a bucket or wherever fsspec reaches: one host publishes, others fetch.

    <url>/<stage>/<key>/<content>/…   the files of an artifact and, written last, its manifest
    <url>/runs/<run>.json             the record of a run, written when its artifacts are there

<content> is a digest of the files. Two hosts that make the same artifact, each with bytes of its own (times in a file,
say), write to different places, and a reader takes either. So nothing is overwritten, but what turned out damaged.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from storage import runs
from storage.artifacts import MANIFEST, SMALL, ArtifactStore, parse_manifest
from storage.errors import DamagedError, StorageError
from storage.gc import size
from storage.keys import digest
from storage.remote_files import RemoteFiles, side_by_side

log = logging.getLogger("saap.storage")


@lru_cache(maxsize=8)
def remote_of(url: str) -> "Remote":
    """The remote at a URL, one a process. Asks it nothing. Raises RemoteError for a URL that is none."""
    return Remote(url)


class Remote:
    """All methods raise RemoteError, in one line, when the remote does not answer or does not allow it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = RemoteFiles(url)
        self._damaged: set[str] = set()  # folders found to be so: the next upload writes them again

    def fetch(self, store: ArtifactStore, stage: str, key: str) -> dict[str, Any] | None:
        """Bring an artifact into the store, and return its manifest; None when the remote has none that is whole.

        Its files are compared with their digests before it is in the store. A damaged one is left out with a warning.
        Hold the store's lock.
        """
        for folder, content, manifest in self._copies(stage, key):
            try:
                with store.adopt(stage, key, content) as draft:
                    self.files.download(folder, manifest["files"], draft)
                return manifest
            except DamagedError as fault:
                log.warning("%s/%s is damaged (%s) and left out", self.url, folder, fault)
                self._damaged.add(folder)
        return None

    def bring(self, store: ArtifactStore, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest of an artifact that is in the store or was fetched now; None when it is in neither."""
        with store.lock(stage, key):
            return store.find(stage, key) or self.fetch(store, stage, key)

    def find(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest of an artifact whose files are all there with their sizes, or None."""
        return next((manifest for folder, _, manifest in self._copies(stage, key) if folder not in self._damaged), None)

    def which(self, references: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of these artifacts (stage, key) that `find` finds."""
        asked = list(references)
        found = side_by_side(lambda one: self.find(*one) is not None, asked)
        return {one for one, there in zip(asked, found, strict=True) if there}

    def spares(self, store: ArtifactStore) -> set[tuple[str, str]]:
        """The artifacts of the store (stage, key), but the small ones, that the remote has too: compared by size."""
        self.files.check(store.root, write=False)
        return self.which(one for one in store.all() if size(store.path(*one)) > SMALL)

    def upload(self, store: ArtifactStore, stage: str, key: str, *, verify: bool = False) -> bool:
        """Copy an artifact of the store, unless the remote has it. Returns whether it has it now.

        verify: compare the content of all its files first.
        """
        if self.find(stage, key) is not None:
            return True
        manifest = store.find(stage, key, verify=verify)
        if manifest is None:
            return False
        files = manifest["files"]
        folder = f"{stage}/{key}/{digest(files)}"
        there = {} if folder in self._damaged else self.files.sizes(folder)
        sizes = {
            name: about["bytes"] for name, about in files.items() if there.get(f"{folder}/{name}") != about["bytes"]
        }
        self.files.upload(store.path(stage, key), folder, sizes)
        self.files.write(f"{folder}/{MANIFEST}", (store.path(stage, key) / MANIFEST).read_bytes())
        self._damaged.discard(folder)
        return True

    def push(self, store: ArtifactStore, run_id: str) -> list[str]:
        """Copy a run: its artifacts as far as they are not there, then its record. Returns those that nobody has."""
        record = runs.read_whole(store.root, run_id)
        wanted = runs.made_by(record["stages"])
        there = self.which(wanted)
        lost = [f"{s}/{k}" for s, k in wanted if (s, k) not in there and not self.upload(store, s, k, verify=True)]
        self.files.write(f"runs/{run_id}.json", json.dumps(record, indent=1).encode())
        return lost

    def pull(self, store: ArtifactStore, run_id: str) -> list[str]:
        """Fetch a run: its artifacts as far as they are not here, then its record. Returns those that nobody has.

        Raises DamagedError when one is damaged in the remote; the run is not in the store then.
        """
        record = self.record(run_id)
        with runs.arriving(store.root, run_id):
            return self._pull(store, run_id, record)

    def _pull(self, store: ArtifactStore, run_id: str, record: dict[str, Any]) -> list[str]:
        lost = []
        for stage, key in runs.made_by(record["stages"]):
            if self.bring(store, stage, key) is None:
                lost.append(f"{stage}/{key}")
        if damaged := [one for one in lost if any(folder.startswith(f"{one}/") for folder in self._damaged)]:
            raise DamagedError(
                f"{damaged[0]} in {self.url} is damaged, and run {run_id} was not fetched: "
                "a run that needs it makes it again and puts it right there"
            )
        runs.write_whole_record(store.root, record)
        return lost

    def all_runs(self) -> list[str]:
        """Ids of the runs whose records are there, oldest first."""
        names = [PurePosixPath(name) for name in self.files.sizes("runs")]
        return sorted(name.stem for name in names if name.match("*.json") and str(name.parent) == "runs")

    def records(self) -> list[dict[str, Any]]:
        """The records of these runs, like `record`. A damaged one is left out with a warning."""
        found = []
        for run_id in self.all_runs():
            try:
                found.append(self.record(run_id))
            except DamagedError as fault:
                log.warning("%s: left out", fault)
        return found

    def record(self, run_id: str) -> dict[str, Any]:
        """The record of a run: {"run": …, "stages": […]}. Raises DamagedError for a damaged one."""
        content = self.files.read(f"runs/{run_id}.json")
        try:
            return runs.parse_whole(content, run_id)
        except StorageError as fault:
            raise DamagedError(f"{self.url}/runs/{run_id}.json is no record of that run ({fault})") from fault

    def _copies(self, stage: str, key: str) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """(folder, content of the manifest, manifest) of each copy of an artifact that is whole by its sizes."""
        there = self.files.sizes(f"{stage}/{key}")
        for path in sorted(there):
            folder, _, name = path.rpartition("/")
            if name != MANIFEST:
                continue
            content = self.files.read(path)
            manifest = parse_manifest(content, stage, key)
            if (
                manifest is None
                or not _is_safe(manifest["files"])
                or not folder.endswith(f"/{digest(manifest['files'])}")
            ):
                continue  # written by nobody we know
            if all(there.get(f"{folder}/{file}") == about["bytes"] for file, about in manifest["files"].items()):
                yield folder, content, manifest


def _is_safe(files: Mapping[str, Any]) -> bool:
    """Whether a manifest from elsewhere names files inside its folder, each with a size and a digest."""
    return all(
        not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and isinstance(about, dict)
        and isinstance(about.get("bytes"), int)
        and isinstance(about.get("sha256"), str)
        for name, about in files.items()
    )
