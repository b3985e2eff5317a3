"""What a store no longer needs, and what takes its space."""

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import runs
from storage.artifacts import BESIDE, ArtifactStore
from storage.errors import BusyError, StorageError
from storage.files import listed
from storage.hints import how_to_list
from storage.keys import KEY
from storage.locks import held, is_held

_TEMPORARY = (
    ".writable-*",
    ".warehouse-*",
    "warehouse.new*",
    "runs/*/.*.????????.tmp",
    "runs/*/stages/.*.????????.tmp",
    "fingerprints/.*.????????.tmp",
    "pages/.*.????????.tmp",
)
# names that we give, each with a stage and a key where it has them: another folder's or file's is not ours
_DRAFT = re.compile(rf"\.draft-({KEY}|gone)-[0-9a-f]{{8}}")
_WORK = re.compile(rf"(\w+)-({KEY})")
_LOCK = re.compile(rf"\w+-({KEY}|gone)\.lock")
_DAMAGED = re.compile(rf"({_WORK.pattern}|warehouse\.duckdb)-[0-9a-f]{{8}}(\.\w+)?")
log = logging.getLogger("saap.storage")
_SETTLED = 3600.0  # seconds: a temporary file of a living process is younger
Reference = tuple[str, str]  # (stage, key)


@dataclass(frozen=True)
class Waste:
    """kind: what it is. why: why it is no longer needed. reference: that of an artifact, a draft or a work folder.

    runs: of what any run could use, the kept runs that were there when it was found.
    """

    kind: str
    path: Path
    bytes: int
    why: str
    reference: Reference | None = None
    runs: frozenset[str] | None = None


def select_runs(
    root: Path, *, ids: Collection[str] = (), names: Collection[str] = (), older_than_days: float | None = None
) -> list[str]:
    """The runs that any of these picks, except living ones. Raises StorageError for a run that does not exist."""
    known = {}
    for run_id in runs.all_runs(root):
        with contextlib.suppress(StorageError):
            known[run_id] = runs.read_run(root, run_id)
    if unknown := [run_id for run_id in ids if run_id not in known]:
        raise StorageError(f"no such run in {root}: {', '.join(unknown)}; {how_to_list(root)}")
    if unknown := [name for name in names if name not in {run["name"] for run in known.values()}]:
        raise StorageError(f"no run in {root} has the name {', '.join(unknown)}; {how_to_list(root)}")
    before = -1.0 if older_than_days is None else time.time() - 86400 * older_than_days
    picked = [r for r, run in known.items() if r in ids or run["name"] in names or run["started_at"] < before]
    if living := [run_id for run_id in picked if runs.is_alive(root, run_id) and run_id in ids]:
        raise StorageError(f"run {living[0]} is at work: stop it first")
    return [run_id for run_id in picked if not runs.is_alive(root, run_id)]


def find_waste(
    store: ArtifactStore, dropped: Collection[str] = (), elsewhere: Collection[Reference] = ()
) -> list[Waste]:
    """What can be removed with the runs in `dropped`: they, artifacts of no other run, and what dead processes left.

    elsewhere: artifacts that need not be kept here, as a remote store has them.

    While a run is at work, artifacts and locks are left alone: it may be about to use them. They are also while the
    record of a run is damaged or lies damaged in the store, as what that run refers to is not known.
    """
    root = store.root
    found = [Waste("run record", root / "runs" / r, size(root / "runs" / r), "asked for") for r in dropped]
    found += _left_by_the_dead(store)
    found += [Waste("damaged", path, size(path), "set aside") for path, _ in _named(root, "damaged/*", _DAMAGED)]
    for file in sorted(file for pattern in _TEMPORARY for file in root.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _SETTLED:
                found.append(Waste("temporary file", file, size(file), "of a dead process"))
    return [*found, *_left_over(store, dropped, elsewhere)]


def _left_by_the_dead(store: ArtifactStore) -> Iterator[Waste]:
    """Drafts and work folders whose artifact nobody is making, and runs that were killed before their record."""
    root = store.root
    for path, name in _named(root, "*/.draft-*", _DRAFT):
        stage, key = path.parent.name, name[1]
        if not is_held(store.lock_file(stage, key)):
            yield Waste("draft", path, size(path), "its run died", (stage, key))
    for path, name in _named(root, "work/*", _WORK):
        if not is_held(store.lock_file(name[1], name[2])):
            why = "its run died; run again, it would go on from here"
            if not any(path.glob("checkpoint-*/trainer_state.json")):  # the trainer writes that last
                why = "its run ended before a first checkpoint: there is nothing to go on from"
            yield Waste("work folder", path, size(path), why, (name[1], name[2]))
    for path in sorted(root.glob("runs/[!.]*/")):
        ours = (path / "alive.lock").exists()
        if ours and not (path / "run.json").exists() and not runs.is_alive(root, path.name):
            yield Waste("run record", path, size(path), "killed before it was written")


def _left_over(store: ArtifactStore, dropped: Collection[str], elsewhere: Collection[Reference]) -> Iterator[Waste]:
    """Artifacts that no kept run needs here, and free locks."""
    root, kept = store.root, frozenset(_run_folders(store.root) - set(dropped))
    if _is_any_alive(root):
        return
    used, unread = references(store, [run_id for run_id in runs.all_runs(root) if run_id not in dropped])
    lost = [*sorted(root.glob("damaged/runs-*")), *unread]
    for path in lost:
        log.warning("no artifact is removed: which ones the damaged %s refers to is not known; delete it first", path)
    if lost:
        return
    for stage, key in store.all():
        why = "whole in the remote store" if (stage, key) in elsewhere else None
        why = why if (stage, key) in used else "no run that is kept refers to it"
        if why is not None:
            path = store.path(stage, key)
            yield Waste("artifact", path, size(path), why, (stage, key), kept)
    for file, _ in _named(root, "locks/*.lock", _LOCK):
        if not is_held(file):
            yield Waste("lock", file, size(file), "nobody holds it", runs=kept)


def _named(root: Path, pattern: str, name: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in sorted(root.glob(pattern)):
        if found := name.fullmatch(path.name):
            yield path, found


def _run_folders(root: Path) -> set[str]:
    return {name for name in listed(root / "runs") if not name.startswith(".")}


def _is_any_alive(root: Path) -> bool:
    return any(runs.is_alive(root, run_id) for run_id in _run_folders(root))


def remove(store: ArtifactStore, waste: Iterable[Waste]) -> int:
    """Remove it, run records first; what is in use by now, or by a run that began since, stays. Returns bytes freed."""
    root, freed, left = store.root, 0, 0
    (root / "locks").mkdir(exist_ok=True)  # a copy of a store may lack an empty folder
    at_work = _is_any_alive(root)  # what begins later has a new folder, but for a pull of a run that is here already

    def is_free(one: Waste) -> bool:
        if one.kind == "run record":
            return not runs.is_alive(root, one.path.name)
        return one.runs is None or (not at_work and _run_folders(root) <= one.runs)

    for one in sorted(waste, key=lambda one: (one.kind != "run record", one.kind == "lock")):
        lock = one.path if one.kind == "lock" else store.lock_file(*one.reference) if one.reference else None
        new = lock is not None and not lock.exists()
        holding = contextlib.nullcontext() if lock is None else held(lock, str(one.path), timeout=0)
        with contextlib.suppress(BusyError), holding:
            if is_free(one):
                freed += _remove(one)
            else:
                left += 1
            if lock is not None and new:
                lock.unlink(missing_ok=True)
    if left:
        log.warning("a run has begun: %d things that it may use are left alone", left)
    return freed


def _remove(one: Waste) -> int:
    try:
        if one.path.is_dir():
            gone = one.path.with_name(f".draft-gone-{uuid.uuid4().hex[:8]}")
            one.path.rename(gone)  # at once not found any more; killed from here on, it is a draft
            shutil.rmtree(gone)
        else:
            one.path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"cannot remove {one.path} ({error.strerror})") from error
    return one.bytes


def references(store: ArtifactStore, run_ids: Iterable[str]) -> tuple[dict[Reference, set[str]], list[Path]]:
    """Artifact → the runs that recorded it, or made it and were killed before they could; and the damaged records."""
    found: dict[Reference, set[str]] = defaultdict(set)
    kept, damaged = set(run_ids), []
    for file in (file for run_id in sorted(kept) for file in runs.stage_files(store.root, run_id)):
        try:
            record = runs.read_stage(file)
            found[record["stage"], record["key"]].add(file.parent.parent.name)
        except (StorageError, FileNotFoundError) as fault:
            if isinstance(fault.__cause__, OSError):
                raise  # another user's file, not a damaged one
            damaged.append(file)
    for stage, key in store.all():
        manifest = store.read_manifest(stage, key)
        if manifest is not None and manifest.get("run_id") in kept:
            found[stage, key].add(manifest["run_id"])
    return dict(found), damaged


def by_stage(store: ArtifactStore) -> list[tuple[str, int, int]]:
    """(stage or what else lies in the store, how many, bytes), the largest first."""
    found: dict[str, list[int]] = defaultdict(list)
    for stage, key in store.all():
        found[stage].append(size(store.path(stage, key)))
    for path in store.root.glob("*/.draft-*"):
        found["(drafts)"].append(size(path))
    for name in BESIDE:
        for path in store.root.glob(f"{name}/*"):
            found[f"({name})"].append(size(path))
    for path in store.root.glob("warehouse.*"):
        found["(warehouse)"].append(size(path))
    return sorted(((name, len(sizes), sum(sizes)) for name, sizes in found.items()), key=lambda row: -row[2])


def by_run(store: ArtifactStore) -> list[tuple[str, str, int, int]]:
    """(run, its name, bytes it refers to, bytes that only it refers to), oldest first."""
    run_ids = runs.all_runs(store.root)
    total, alone = dict.fromkeys(run_ids, 0), dict.fromkeys(run_ids, 0)
    for (stage, key), users in references(store, run_ids)[0].items():
        bytes_ = size(store.path(stage, key))
        for run_id in users:
            total[run_id] += bytes_
            alone[run_id] += bytes_ if len(users) == 1 else 0
    rows = []
    for run_id in run_ids:
        with contextlib.suppress(StorageError, FileNotFoundError):
            rows.append((run_id, runs.read_run(store.root, run_id)["name"], total[run_id], alone[run_id]))
    return rows


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    found = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not path.is_dir():
            return path.lstat().st_size
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found += os.lstat(os.path.join(folder, name)).st_size
    return found
