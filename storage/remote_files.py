"""Files below a URL of any kind that fsspec knows: listed, read, written, in pieces side by side.

What is wrong comes as one line. Tested with S3 (s3fs) and folders.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from tqdm.auto import tqdm

from storage.artifacts import FULL
from storage.errors import DamagedError, StorageError

AT_ONCE = 8  # requests
PATIENCE = 30.0  # seconds for the check before a run
PIECE = 1 << 25  # bytes that one request downloads
PROBE = ".saap"  # written by `check`, with the same content each time: not every bucket lets us delete
_WRONG = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTDIR)  # what no waiting helps
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
Item = TypeVar("Item")


class RemoteError(StorageError):
    """may_pass: whether the same request may succeed later."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class RemoteFiles:
    """Names are relative to the URL. All methods raise RemoteError when it does not answer or does not allow it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if "://" not in url and not url.startswith("/"):
            raise RemoteError(
                f"'{url}' is no place for a remote store: give a URL, as s3://bucket/prefix, or a whole path"
            )
        if urlsplit(url).password:
            raise RemoteError("store_remote holds a password, and run records would show it: set it in the environment")
        # s3fs answers from listings of its own for ever, and so misses what other hosts wrote
        options: dict[str, Any] = {"use_listings_cache": False}
        if url.startswith(("s3://", "s3a://")):  # each of s3fs' five tries is five of botocore's otherwise, of 15 s
            options["config_kwargs"] = {"retries": {"total_max_attempts": 3}}
        try:
            self._fs, root = url_to_fs(url, **options)
        except ImportError as error:
            remedy = "pip install -c constraints.txt s3fs" if url.startswith("s3") else _short(error)
            raise RemoteError(f"a package for {self.url} is not installed: {remedy}") from error
        except Exception as error:
            raise RemoteError(f"'{self.url}' is no place for a remote store: {_short(error)}") from error
        self._root: str = str(root).rstrip("/")
        if not self._root:
            raise RemoteError(f"'{url}' names no bucket or folder: give one, as in s3://bucket/prefix")
        self._folders = not isinstance(self._fs, AsyncFileSystem)  # object stores have none, and are asynchronous

    def check(self, store: Path, *, write: bool) -> None:
        """Whether it can be listed and, with write, written, soon. store: the local one, which must not lie in it."""
        local = Path(self._root) if "file" in _protocols(self._fs) else None
        if local is not None and (local.resolve() in (own := store.resolve(), *own.parents) or own in local.parents):
            raise RemoteError(
                f"the remote store {self.url} and the store {own} lie in each other: choose another place"
            )
        answer: Future[None] = Future()

        def ask() -> None:
            try:
                self._ask(write)
                answer.set_result(None)
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer.result(timeout=PATIENCE)
        except TimeoutError as error:
            raise RemoteError(
                f"the remote store {self.url} did not answer for {PATIENCE:.0f} s: "
                "give the same command again when it does",
                may_pass=True,
            ) from error

    def _ask(self, write: bool) -> None:
        with self._asking("read"):
            if self._folders and not self._fs.exists(self._root):
                raise FileNotFoundError("it does not exist")
            self._fs.find(f"{self._root}/{PROBE}")
        if write:
            self.write(PROBE, b"a store of saap\n")

    def sizes(self, folder: str) -> dict[str, int]:
        """Size by name of all files below a folder."""
        with self._asking("read"):
            try:
                self._fs.invalidate_cache()
                found = self._fs.find(self._path(folder), detail=True)
            except FileNotFoundError:
                if not self._folders:
                    raise  # of an object store only a bucket can be missing
                found = {}
        return {name[len(self._root) + 1 :]: int(about["size"] or 0) for name, about in found.items()}

    def read(self, name: str) -> bytes:
        with self._asking("read"):
            content: bytes = self._fs.cat_file(self._path(name))
            return content

    def download(self, folder: str, files: Mapping[str, Any], draft: Path) -> None:
        pieces = []
        for name, about in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            with (draft / name).open("wb") as file:
                file.truncate(about["bytes"])
            pieces += [(name, at, min(at + PIECE, about["bytes"])) for at in range(0, about["bytes"], PIECE)]

        def get(piece: tuple[str, int, int]) -> int:
            name, start, end = piece
            with self._asking("read"):
                try:
                    data = self._fs.cat_file(self._path(f"{folder}/{name}"), start=start, end=end)
                except FileNotFoundError as error:
                    raise DamagedError(f"{name} has just gone") from error
            with (draft / name).open("r+b") as file:
                os.pwrite(file.fileno(), data, start)
            return end - start

        with _bar("download", folder, files) as bar:
            side_by_side(get, pieces, bar.update)

    def upload(self, here: Path, folder: str, sizes: Mapping[str, int]) -> None:
        with _bar("upload", folder, {name: {"bytes": size} for name, size in sizes.items()}) as bar:

            def put(name: str) -> None:
                sent = _Sent(bar)
                path = self._path(f"{folder}/{name}")
                with self._asking("write"):
                    self._make_parent(path)
                    self._fs.put_file(str(here / name), path, callback=sent)
                bar.update(sizes[name] - sent.value)

            side_by_side(put, [name for name, size in sizes.items() if size <= PIECE])
            for name in (name for name, size in sizes.items() if size > PIECE):
                put(name)  # sent in parts side by side, by s3fs: several at once would take gigabytes of memory

    def write(self, name: str, content: bytes) -> None:
        with self._asking("write"):
            self._make_parent(self._path(name))
            self._fs.pipe_file(self._path(name), content)

    def _make_parent(self, path: str) -> None:
        if self._folders:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Whatever the library of the file system raises becomes a RemoteError."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            number, may_pass = getattr(error, "errno", None), False
            if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
                s3 = (
                    " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
                    if self.url.startswith("s3")
                    else ""
                )
                remedy = f"set credentials{s3} that may {what} there"
                remedy += "; without such, saap pull fetches runs" if what == "write" else ""
            elif isinstance(error, FileNotFoundError):
                remedy = "make it first, or correct the URL"
            elif number in FULL:
                remedy = "free some space there"
            elif isinstance(error, ValueError | TypeError) or number in _WRONG:
                remedy = "correct the URL"
            else:
                remedy, may_pass = "give the same command again when it answers", True
            message = f"cannot {what} the remote store {self.url} ({_short(error)}): {remedy}"
            raise RemoteError(message, may_pass=may_pass) from error


class _Sent(Callback):
    """Counts the bytes of one file, on a bar too."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._bar.update(inc)


def side_by_side(
    work: Callable[[Item], Any], items: Sequence[Item], done: Callable[[Any], Any] = lambda result: None
) -> list[Any]:
    """The results of work on each item, in their order, some at once. After an error none is begun any more."""
    results = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for result in pool.map(work, items):
                done(result)
                results.append(result)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def _bar(what: str, folder: str, files: Mapping[str, Any]) -> Any:
    """Shown when it takes longer than a second."""
    total = sum(about["bytes"] for about in files.values())
    return tqdm(total=total, desc=f"{what} {folder.partition('/')[0]}", unit="B", unit_scale=True, delay=1)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
