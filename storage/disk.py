"""What the disk holds of each run, part by part, with signatures to compare by.

A part is the run itself or one of its stages. Of a run the signature is the digest of its record, of a stage the size
and time of its record and of its artifact's tables.
"""

import hashlib
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
        self._tables: dict[tuple[str, str], str] = {}

    def changes(self, known: dict[str, Parts], only: str | None) -> dict[str, tuple[Parts, Parts]]:
        """Run → (its parts as loaded, as wanted), for the runs where they differ."""
        run_ids = [only] if only else sorted({*runs.all_runs(self.store.root), *known})
        both = {run_id: (known.get(run_id, {}), self._parts(run_id, known.get(run_id, {}))) for run_id in run_ids}
        return {run_id: pair for run_id, pair in both.items() if pair[0] != pair[1]}

    def _parts(self, run_id: str, known: Parts) -> Parts:
        root = self.store.root
        try:
            content = read_small(root / "runs" / run_id / "run.json")
            self.records[run_id, ""] = runs.parse_run(content, run_id)
        except FileNotFoundError:
            return {}
        except StorageError as fault:
            if isinstance(fault.__cause__, PermissionError):
                raise  # another user's file, not a damaged one
            if not runs.is_alive(root, run_id):
                move_aside(root, root / "runs" / run_id, f"runs-{run_id}", f"the record of run {run_id}", str(fault))
            return {}
        parts = {"": Part(hashlib.sha256(content).hexdigest())}
        for file in runs.stage_files(root, run_id):
            try:
                record = _signature(file)
                before = known.get(file.stem)
                if before is None or before.record != record:
                    stage = self.records[run_id, file.stem] = runs.read_stage(file)
                    before = Part(record, stage["stage"], stage["key"])
                parts[file.stem] = replace(before, tables=self.tables_of(before.stage, before.key))
            except FileNotFoundError:
                continue
            except OSError as fault:
                self._set_stage_aside(file, run_id, fault)
        return parts

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
            folder = self.store.path(stage, key)
            try:
                found = [_signature(folder / MANIFEST)]
                found += [_signature(file) if (file := folder / f"{t}.parquet").is_file() else ABSENT for t in tables]
                self._tables[stage, key] = " ".join(found)
            except PermissionError:
                raise
            except OSError:
                self._tables[stage, key] = ABSENT
        return self._tables.get((stage, key), "")


def _signature(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}"
