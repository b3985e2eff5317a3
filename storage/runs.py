"""What each run did, as small files beside the artifacts: the record the warehouse follows.

`<root>/runs/<run_id>/run.json` holds the run, `stages/<position>.json` one stage each. A run holds `alive.lock` while
its process lives, so a killed one can be told from a running one.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from storage.damage import move_aside
from storage.errors import StorageError
from storage.files import listed, read_small, write_whole
from storage.locks import held, is_held


def _text(value: Any) -> bool:
    """One that UTF-8 can hold: JSON can spell halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _time(value: Any) -> bool:
    return _number(value) and 0 <= value < 1e11


def _name(value: Any) -> bool:
    """Part of a path, and only one."""
    return _text(value) and 0 < len(value) < 200 and not set(value) & set("/\0") and not value.startswith(".")


def _is_config(value: Any) -> bool:
    """JSON of sections, beside them the name, the stores and the data."""
    try:
        fields = json.loads(value) if _text(value) else None
    except (TypeError, ValueError, RecursionError):
        return False
    kinds = {"name": str, "store": str, "store_remote": str | None, "data": str}
    if not isinstance(fields, dict) or not _text(json.dumps(fields, ensure_ascii=False)):
        return False
    return all(isinstance(held, kinds.get(name, dict)) for name, held in fields.items())


_STAGE_FILE = re.compile(r"[0-9]{4}\.json")
Fields = dict[str, Callable[[Any], bool]]
_RUN: Fields = {
    **dict.fromkeys(("run_id", "name", "model", "data", "criterion"), _text),
    "status": lambda value: value in ("running", "completed", "failed", "killed"),
    **{"ratio": _number, "config": _is_config, "error": _text_or_none},
    **{"started_at": _time, "finished_at": lambda value: value is None or _time(value)},
    "flow_run": _text_or_none,  # of Prefect's
}
_STAGE: Fields = {
    **{"position": lambda value: isinstance(value, int), "stage": _name, "key": _name},
    **{"benchmark": _text_or_none, "skipped": _text_or_none},
    "variant": lambda value: value in (None, "dense", "pruned", "recovered"),
    **{"cached": lambda value: isinstance(value, bool), "seconds": _number_or_none, "at": _time},
}
# what records from before there was a choice do not say
_RUN_DEFAULTS = {"criterion": "saap", "error": None, "flow_run": None}
_STAGE_DEFAULTS = {"skipped": None}


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(value, indent=1))
    except FileNotFoundError as error:
        raise StorageError(f"the store was removed while the run was at work: there is no {path.parent}") from error
    except OSError as error:
        raise StorageError(f"cannot write the run record {path} ({error.strerror})") from error


class RunRecord:
    """The record of the run of this process. Raises StorageError when the store cannot be written."""

    def __init__(self, root: Path, run_id: str, **about: Any) -> None:
        self.run_id = run_id
        self._folder = root / "runs" / run_id
        try:
            (self._folder / "stages").mkdir(parents=True)
            self._alive = FileLock(self._folder / "alive.lock")
            self._alive.acquire()
        except OSError as error:
            raise StorageError(f"cannot write the run record {self._folder} ({error.strerror})") from error
        self._run = {"run_id": run_id, **about, "started_at": time.time(), "finished_at": None, "status": "running"}
        _write(self._folder / "run.json", self._run)

    def stage(self, position: int, **about: Any) -> None:
        """A stage's artifact is there, or why not: stage, key, variant, benchmark, cached, seconds, skipped."""
        _write(self._folder / "stages" / f"{position:04d}.json", {"position": position, **about, "at": time.time()})

    @property
    def finished(self) -> bool:
        return bool(self._run["status"] != "running")

    def finish(self, status: str, error: str | None = None) -> None:
        self._run |= {"finished_at": time.time(), "status": status, "error": error}
        _write(self._folder / "run.json", self._run)
        self._alive.release()


def all_runs(root: Path) -> list[str]:
    """Run ids, oldest first (they begin with the time). A run.json without what we put beside it is not ours."""
    folders = [root / "runs" / name for name in listed(root / "runs") if not name.startswith(".")]
    return sorted(
        folder.name
        for folder in folders
        if (folder / "run.json").exists() and ((folder / "alive.lock").exists() or (folder / "stages").exists())
    )


def read_run(root: Path, run_id: str) -> dict[str, Any]:
    """Raises StorageError for a damaged record, FileNotFoundError when there is none."""
    return parse_run(read_small(root / "runs" / run_id / "run.json"), run_id)


def parse_run(content: bytes, run_id: str) -> dict[str, Any]:
    run = _checked(content, _RUN, _RUN_DEFAULTS)
    if run["run_id"] != run_id:
        raise StorageError(f"it is the record of run {run['run_id']}")
    return run


def stage_files(root: Path, run_id: str) -> list[Path]:
    """The files of a run's stages, in the order of the run."""
    folder = root / "runs" / run_id / "stages"
    return [folder / name for name in stage_names(folder)]


def stage_names(folder: Path) -> list[str]:
    """The names of those files in their folder."""
    return sorted(name for name in listed(folder) if _STAGE_FILE.fullmatch(name))


def read_stage(file: Path) -> dict[str, Any]:
    """Raises StorageError for a damaged record, FileNotFoundError when there is none."""
    stage = _checked(read_small(file), _STAGE, _STAGE_DEFAULTS)
    if stage["position"] != int(file.stem):
        raise StorageError(f"it is the record of step {stage['position']}")
    return stage


def read_stages(root: Path, run_id: str) -> Iterator[dict[str, Any]]:
    return (read_stage(file) for file in stage_files(root, run_id))


def read_whole(root: Path, run_id: str) -> dict[str, Any]:
    """{"run": its record, "stages": those of its stages}. Raises like `read_run`."""
    return {"run": read_run(root, run_id), "stages": list(read_stages(root, run_id))}


def parse_whole(content: bytes, run_id: str) -> dict[str, Any]:
    """What `read_whole` returned, from JSON. Raises StorageError for a damaged one."""
    whole = _checked(content, {"run": lambda v: isinstance(v, dict), "stages": lambda v: isinstance(v, list)}, {})
    run = parse_run(json.dumps(whole["run"]).encode(), run_id)
    return {"run": run, "stages": [_checked(json.dumps(s).encode(), _STAGE, _STAGE_DEFAULTS) for s in whole["stages"]]}


def write_whole_record(root: Path, whole: dict[str, Any]) -> None:
    """Take over the record of a run of another store, unless it is here. Killed in the middle, the run is not there."""
    folder = root / "runs" / whole["run"]["run_id"]
    if (folder / "run.json").exists():
        return
    try:
        (folder / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write the run record {folder} ({error.strerror})") from error
    for stage in whole["stages"]:
        _write(folder / "stages" / f"{stage['position']:04d}.json", stage)
    _write(folder / "run.json", whole["run"])


@contextlib.contextmanager
def arriving(root: Path, run_id: str) -> Iterator[None]:
    """While open the run counts as alive, so that gc leaves its artifacts alone; of one without a record nothing stays.

    Raises StorageError when the store cannot be written.
    """
    folder = root / "runs" / run_id
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / "alive.lock", f"run {run_id}", timeout=-1))
        except PermissionError as error:
            raise StorageError(f"cannot write the run record {folder} ({error.strerror})") from error
        try:
            yield
        finally:
            if not (folder / "run.json").exists():
                shutil.rmtree(folder, ignore_errors=True)


def made_by(stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(stage, key) of the artifacts of a run's stages, each once, in their order."""
    return list(dict.fromkeys((stage["stage"], stage["key"]) for stage in stages if stage["skipped"] is None))


def is_alive(root: Path, run_id: str) -> bool:
    """Whether the process of the run lives."""
    return is_held(root / "runs" / run_id / "alive.lock")


def mark_killed(root: Path) -> list[str]:
    """Runs that say they are running but whose process is gone get the status 'killed'. Returns their ids.

    A damaged run record is set aside with all of its run, unless the run lives: it will write its record again.
    """
    killed = []
    for run_id in all_runs(root):
        try:
            run = read_run(root, run_id)
            # read again: it may have finished in between
            if run["status"] != "running" or is_alive(root, run_id) or read_run(root, run_id)["status"] != "running":
                continue
            _write(root / "runs" / run_id / "run.json", run | {"status": "killed"})
            killed.append(run_id)
        except FileNotFoundError:  # another process has just set it aside
            continue
        except StorageError as fault:
            if isinstance(fault.__cause__, OSError):
                raise  # a disk that cannot be written, not a damaged record
            if not is_alive(root, run_id):
                move_aside(root, root / "runs" / run_id, f"runs-{run_id}", f"the record of run {run_id}", str(fault))
    return killed


def killed_flow_runs(root: Path) -> dict[str, list[str]]:
    """Flow run → the killed runs that it did, as long as nobody has told Prefect."""
    found: dict[str, list[str]] = {}
    for run_id in all_runs(root):
        with contextlib.suppress(StorageError, FileNotFoundError):
            run = read_run(root, run_id)
            if run["status"] == "killed" and run["flow_run"] is not None:
                found.setdefault(run["flow_run"], []).append(run_id)
    return found


def forget_flow_run(root: Path, run_id: str) -> None:
    """Of a run whose end Prefect knows."""
    _write(root / "runs" / run_id / "run.json", read_run(root, run_id) | {"flow_run": None})


def _checked(content: bytes, fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    """The record in a file's content. Raises StorageError that says what is wrong with it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError("it is empty" if not content.strip() else "it is no JSON") from error
    if not isinstance(value, dict):
        raise StorageError("it is no JSON object")
    value = defaults | value
    for field, fits in fields.items():
        if field not in value:
            raise StorageError(f"it has no {field}")
        if not fits(value[field]):
            raise StorageError(f"its {field} is {str(value[field])[:40]!r}")
    return value
