"""Content-addressed folders: `<root>/<stage>/<key>/`, published whole or not at all."""

import contextlib
import errno
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.damage import move_aside
from storage.errors import DamagedError, StorageError
from storage.files import PASSING, fsync, read_small
from storage.keys import file_digest, is_key
from storage.locks import held

MANIFEST = "manifest.json"
# folders of a store that are no stage
BESIDE = ("work", "damaged", "runs", "locks", "fingerprints", "pages", "prefect")
FULL = (errno.ENOSPC, errno.EDQUOT)
# what a manifest need not say
_UNSAID: dict[str, Any] = {"run_id": "", "params": {}, "inputs": [], "outside": {}, "versions": {}, "summary": {}}
SMALL = 1 << 22  # bytes: files up to this size are compared by content always


class ArtifactStore:
    """The artifacts under one root folder.

    An artifact is a folder with a manifest: its inputs, files (size, sha256), versions, seconds. It is written into a
    hidden sibling, flushed to disk, and renamed into place with the manifest last; so what is there is whole, and it
    never changes. What turns out damaged is moved to `<root>/damaged/` and no longer found.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()

    def prepare(self) -> None:
        """Make the root folder. Raises StorageError when nothing can be written there."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{uuid.uuid4().hex}"
            probe.write_bytes(bytes(SMALL // 1024))  # not empty: that a full disk still takes
            probe.unlink()
        except OSError as error:
            remedy = "free some space" if error.errno in FULL else "choose another with --store or the config"
            raise StorageError(f"cannot write to the store {self.root} ({error.strerror}): {remedy}") from error

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def find(self, stage: str, key: str, *, verify: bool = False) -> dict[str, Any] | None:
        """The manifest of a whole artifact, or None. A damaged one is set aside, with a warning.

        Sizes are always checked, and contents (sha256) of small files; with verify=True of all.
        """
        manifest, fault = self.inspect(stage, key, verify=verify)
        if fault is not None:
            self.set_aside(stage, key, fault)
        return manifest

    def set_aside(self, stage: str, key: str, fault: str) -> None:
        move_aside(self.root, self.path(stage, key), f"{stage}-{key}", f"artifact {stage}/{key}", fault)

    def inspect(self, stage: str, key: str, *, verify: bool = False) -> tuple[dict[str, Any] | None, str | None]:
        """(manifest or None, what is wrong or None), changing nothing. An artifact that does not exist is not wrong."""
        folder = self.path(stage, key)
        if not folder.exists():
            return None, None
        manifest = self.read_manifest(stage, key)
        if manifest is None:
            return None, "its manifest is missing or unreadable"
        for name, about in manifest["files"].items():
            try:
                if fault := _fault(folder / name, about, verify):
                    return None, f"{name} {fault}"
            except OSError as error:
                cause = error.__cause__ or error
                if isinstance(cause, PermissionError) or getattr(cause, "errno", None) in PASSING:
                    raise  # another user's, or it may pass: not damaged
                return None, f"{name} cannot be read ({error})"
        return manifest, None

    def read_manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """None when there is none, or it is none of ours. Says nothing of the files."""
        try:
            return parse_manifest(read_small(self.path(stage, key) / MANIFEST), stage, key)
        except StorageError as error:
            if error.__cause__ is not None:  # no fault of the file
                raise
            return None
        except OSError:
            return None

    @contextlib.contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """One writer an artifact, over processes. The kernel frees the lock when its holder dies."""
        file = self.lock_file(stage, key)
        if self.root.is_dir():
            file.parent.mkdir(exist_ok=True)
        with held(file, f"{stage}/{key}", timeout=-1):
            yield

    def lock_file(self, stage: str, key: str) -> Path:
        return self.root / "locks" / f"{stage}-{key}.lock"

    @contextlib.contextmanager
    def publish(self, stage: str, key: str, **about: Any) -> Iterator[Path]:
        """A folder to fill; when the block ends without an error it becomes the artifact.

        `about` goes into the manifest, with the files and the seconds the block took. Hold `lock` around it.
        Raises StorageError for a full disk; what was written is removed.
        """
        started = time.time()
        with self._draft(stage, key) as draft:
            yield draft
            files = {}
            for file in sorted(p for p in draft.rglob("*") if p.is_file()):
                fsync(file)
                files[str(file.relative_to(draft))] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
            manifest = {
                "stage": stage,
                "key": key,
                **about,
                "files": files,
                "seconds": time.time() - started,
                "finished_at": time.time(),
            }
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
            fsync(draft / MANIFEST)

    @contextlib.contextmanager
    def adopt(self, stage: str, key: str, manifest: bytes) -> Iterator[Path]:
        """A folder to fill with the files of an artifact that another store published with this manifest.

        It becomes the artifact when they are what the manifest says; else DamagedError is raised and nothing is left.
        Hold `lock` around it.
        """
        with self._draft(stage, key) as draft:
            yield draft
            for name, about in json.loads(manifest)["files"].items():
                if fault := _fault(draft / name, about, verify=True):
                    raise DamagedError(f"{name} {fault}")
                fsync(draft / name)
            (draft / MANIFEST).write_bytes(manifest)
            fsync(draft / MANIFEST)

    @contextlib.contextmanager
    def _draft(self, stage: str, key: str) -> Iterator[Path]:
        """A hidden sibling of the artifact's place: renamed to it at the end of the block, removed after an error."""
        draft = self.root / stage / f".draft-{key}-{uuid.uuid4().hex[:8]}"
        self._sweep_drafts(stage, key)
        draft.mkdir(parents=True)
        try:
            yield draft
            fsync(draft)
            draft.rename(self.path(stage, key))
            fsync(draft.parent)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, Exception) and not draft.parent.is_dir():
                raise StorageError(f"the store {self.root} was removed while {stage} was at work") from error
            full = isinstance(error, OSError) and error.errno in FULL
            if full or "No space left on device" in str(error):  # safetensors has an error type of its own
                raise StorageError(f"no space left for {stage} in {self.root}: free some and run again") from error
            raise

    def all(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of every artifact folder, whole or not. What else lies in the root folder is left out.

        Other programs give folders names like ours: an artifact has a manifest, or a lock that it was published under.
        """
        for folder in sorted(self.root.glob("*/*/")):
            stage, key = folder.parent.name, folder.name
            ours = (folder / MANIFEST).exists() or self.lock_file(stage, key).exists()
            if ours and is_key(key) and stage not in BESIDE:
                yield stage, key

    def work(self, stage: str, key: str) -> Path:
        """A scratch folder that survives a crash, for stages that can go on in the middle."""
        folder = self.root / "work" / f"{stage}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_work(self, stage: str, key: str) -> None:
        shutil.rmtree(self.root / "work" / f"{stage}-{key}", ignore_errors=True)

    def _sweep_drafts(self, stage: str, key: str) -> None:
        """Remove what killed writers of this artifact left: the lock is ours, so none of them lives."""
        for draft in (self.root / stage).glob(f".draft-{key}-*"):
            shutil.rmtree(draft, ignore_errors=True)


def parse_manifest(content: bytes, stage: str, key: str) -> dict[str, Any] | None:
    """The manifest of an artifact in the content of its file; None when it is none."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return {**_UNSAID, **manifest} if _is_manifest(manifest, stage, key) else None


def _is_manifest(value: Any, stage: str, key: str) -> bool:
    if not isinstance(value, dict) or (value.get("stage"), value.get("key")) != (stage, key):
        return False
    value = {**_UNSAID, **value}
    kinds: dict[str, Any] = {"files": dict, "seconds": float | int, "finished_at": float | int}
    kinds |= {name: type(unsaid) for name, unsaid in _UNSAID.items()}
    return (
        all(isinstance(value.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(one, list) and [type(part) for part in one] == [str] * 3 for one in value["inputs"])
        and all(isinstance(text, str) for name in ("outside", "versions") for text in value[name].values())
    )


def _fault(file: Path, about: Any, verify: bool) -> str | None:
    """What is wrong with a file of an artifact, or None."""
    if not isinstance(about, dict) or not isinstance(about.get("bytes"), int) or "sha256" not in about:
        return "is not described by its manifest"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != about["bytes"]:
        return "has another size than its manifest says"
    if (verify or about["bytes"] <= SMALL) and file_digest(file) != about["sha256"]:
        return "has other content than its manifest says"
    return None
