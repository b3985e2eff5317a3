"""What the disk holds of each run, part by part, with signatures to compare by.

A part is the run itself or one of its stages. Of a run the signature is the digest of its record, of a stage the size
and time of its record and of its artifact's tables.
"""

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage import runs
from storage.artifacts import MANIFEST, ArtifactStore
from storage.damage import move_aside
from storage.errors import StorageError
from storage.files import read_small

# stage → the tables loaded from its artifact
STAGE_TABLES = {
    "fluctuation": ("groups",),
    "rank": ("groups",),
    "prune": ("widths",),
    "recover": ("training",),
    "evaluate": ("metrics", "items"),
    "speed": ("speed",),
}
ABSENT = "-"  # signature of tables that are not there


@dataclass(frozen=True)
class Part:
    """record and tables are signatures; stage and key name the artifact (of a run itself: empty)."""

    record: str
    stage: str = ""
    key: str = ""
    tables: str = ""


Parts = dict[str, Part]  # by name: '' for the run itself, '0003' for the stage at position 3


class Disk:
    """The records and artifacts as they are now. Damaged records are set aside when they are met."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.records: dict[tuple[str, str], dict[str, Any]] = {}  # (run, part) → what was read along the way
        self._contents: dict[str, bytes] = {}  # of run.json, as compared
        self._tables: dict[tuple[str, str], str] = {}

    def changes(self, known: dict[str, Parts], only: str | None) -> dict[str, tuple[Parts, Parts]]:
        """Run → (its parts as loaded, as wanted), for the runs where they differ."""
        run_ids = [only] if only else sorted({*runs.all_runs(self.store.root), *known})
        both = {run_id: (known.get(run_id, {}), self._parts(run_id, known.get(run_id, {}))) for run_id in run_ids}
        return {run_id: pair for run_id, pair in both.items() if pair[0] != pair[1]}

    def _parts(self, run_id: str, known: Parts) -> Parts:
        root = self.store.root
        try:
            content = self._contents[run_id] = read_small(root / "runs" / run_id / "run.json")
            digest = Part(hashlib.sha256(content).hexdigest())
            if known.get("") != digest:  # the same content was whole when it was loaded
                self.run(run_id)
        except FileNotFoundError:
            return {}
        except StorageError as fault:
            if isinstance(fault.__cause__, PermissionError):
                raise  # another user's file, not a damaged one
            if not runs.is_alive(root, run_id):
                move_aside(root, root / "runs" / run_id, f"runs-{run_id}", f"the record of run {run_id}", str(fault))
            return {}
        parts = {"": digest}
        folder = root / "runs" / run_id / "stages"
        for name in runs.stage_names(folder):
            position = name.removesuffix(".json")
            try:
                record = _signature(f"{folder}/{name}")
                before = known.get(position)
                if before is None or before.record != record:
                    stage = self.records[run_id, position] = runs.read_stage(folder / name)
                    before = Part(record, stage["stage"], stage["key"])
                tables = self.tables_of(before.stage, before.key)
                parts[position] = before if before.tables == tables else replace(before, tables=tables)
            except FileNotFoundError:
                continue
            except OSError as fault:
                self._set_stage_aside(folder / name, run_id, fault)
        return parts

    def run(self, run_id: str) -> dict[str, Any]:
        """The record of a run, as it was compared. Raises StorageError for a damaged one."""
        if (run_id, "") not in self.records:
            self.records[run_id, ""] = runs.parse_run(self._contents[run_id], run_id)
        return self.records[run_id, ""]

    def stage(self, run_id: str, name: str) -> dict[str, Any] | None:
        """The record of a stage; None when it went in this moment: the next comparison sees that."""
        if (run_id, name) not in self.records:
            file = self.store.root / "runs" / run_id / "stages" / f"{name}.json"
            try:
                self.records[run_id, name] = runs.read_stage(file)
            except FileNotFoundError:
                return None
            except StorageError as fault:
                self._set_stage_aside(file, run_id, fault)
                return None
        return self.records[run_id, name]

    def _set_stage_aside(self, file: Path, run_id: str, fault: OSError) -> None:
        if isinstance(fault.__cause__ or fault, PermissionError):
            raise fault  # another user's file, not a damaged one
        move_aside(self.store.root, file, f"runs-{run_id}-{file.stem}", f"the stage record {file}", str(fault))

    def tables_of(self, stage: str, key: str) -> str:
        tables = STAGE_TABLES.get(stage, ())
        if tables and (stage, key) not in self._tables:
            folder = f"{self.store.root}/{stage}/{key}"  # text, not Path: there may be tens of thousands
            try:
                found = [
                    _signature(f"{folder}/{MANIFEST}"),
                    *(_signature_or_absent(f"{folder}/{t}.parquet") for t in tables),
                ]
                self._tables[stage, key] = " ".join(found)
            except PermissionError:
                raise
            except OSError:
                self._tables[stage, key] = ABSENT
        return self._tables.get((stage, key), "")


def _signature(file: str) -> str:
    return _of(os.stat(file))


def _signature_or_absent(file: str) -> str:
    """ABSENT where there is no regular file. Raises PermissionError."""
    try:
        found = os.stat(file)
    except PermissionError:
        raise
    except OSError:
        return ABSENT
    return _of(found) if stat.S_ISREG(found.st_mode) else ABSENT


def _of(found: os.stat_result) -> str:
    return f"{found.st_size}:{found.st_mtime_ns}"
