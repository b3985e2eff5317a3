"""What each run did, as small files beside the artifacts: the record the warehouse is loaded from.

`<root>/runs/<run_id>/run.json` holds the run, `stages/<position>.json` one stage each. A run holds `alive.lock` while
its process lives, so a killed one can be told from a running one.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RunRecord:
    """The record of the run of this process."""

    def __init__(self, root: Path, run_id: str, **about: Any) -> None:
        self.run_id = run_id
        self._folder = root / "runs" / run_id
        (self._folder / "stages").mkdir(parents=True)
        self._alive = FileLock(self._folder / "alive.lock")
        self._alive.acquire()
        self._run = {"run_id": run_id, **about, "started_at": time.time(), "finished_at": None, "status": "running"}
        _write(self._folder / "run.json", self._run)

    def stage(self, position: int, **about: Any) -> None:
        """A stage's artifact is there, or why not: stage, key, variant, benchmark, cached, seconds, skipped."""
        _write(self._folder / "stages" / f"{position:04d}.json", {"position": position, **about, "at": time.time()})

    def finish(self, status: str, error: str | None = None) -> None:
        self._run |= {"finished_at": time.time(), "status": status, "error": error}
        _write(self._folder / "run.json", self._run)
        self._alive.release()


def all_runs(root: Path) -> list[str]:
    """Run ids, oldest first (they begin with the time)."""
    return sorted(p.parent.name for p in (root / "runs").glob("*/run.json"))


def read_run(root: Path, run_id: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((root / "runs" / run_id / "run.json").read_text())
    return {"criterion": "saap"} | run  # runs from before there was a choice do not say


def read_stages(root: Path, run_id: str) -> Iterator[dict[str, Any]]:
    for file in sorted((root / "runs" / run_id / "stages").glob("*.json")):
        yield json.loads(file.read_text())


def mark_killed(root: Path) -> list[str]:
    """Runs that say they are running but whose process is gone get the status 'killed'. Returns their ids."""
    killed = []
    for run_id in all_runs(root):
        run = read_run(root, run_id)
        if run["status"] != "running":
            continue
        try:
            with FileLock(root / "runs" / run_id / "alive.lock", timeout=0):
                if read_run(root, run_id)["status"] == "running":
                    _write(root / "runs" / run_id / "run.json", run | {"status": "killed"})
                    killed.append(run_id)
        except Timeout:
            continue
    return killed
