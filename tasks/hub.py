"""The model hub: retries, refusals in one line, and answers that are kept for offline use."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from storage.files import write_whole
from tasks.toml import ConfigError

Found = TypeVar("Found")
# seconds before the second, third and last try; what the hub's Retry-After says goes first, up to a minute
WAITS = (1.0, 4.0, 15.0)
LONGEST_WAIT = 60.0


class HubError(ConfigError):
    """The hub does not give what is asked for. The message is one line. may_pass: whether it may later."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass
class Split:
    """A split of a hub data set at one commit: its files in order, and the rows of each where they were counted."""

    repository: str
    commit: str
    files: list[str]
    rows: list[int] = field(default_factory=list)


def ask(what: str, action: Callable[[], Found]) -> Found:
    """The result of a call of huggingface_hub. `what` it is about, for people: 'the model org/name'.

    What may pass (a network that fails, 429, 5xx, a download that ends early) is tried four times, but what hf_xet
    downloads once: it tries by itself for minutes. Raises HubError; errors of this machine's disk go through as they
    are.
    """
    from huggingface_hub.errors import HTTPError

    for wait in (*WAITS, None):
        try:
            return action()
        except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:  # RuntimeError: hf_xet's
            cause = _answer_in(error)
            if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
                raise
            why, passes, asked = _explain(what, cause)
            if not passes or wait is None:
                raise HubError(why, may_pass=passes) from error
            wait = min(asked if asked is not None else wait, LONGEST_WAIT)
            logging.getLogger(__name__).warning("%s; trying again in %.0f s", why.partition(": ")[0], wait)
            time.sleep(wait)
    raise AssertionError


def _answer_in(error: BaseException) -> BaseException:
    """The error that holds the hub's answer, found among the causes of this one; else the direct cause."""
    link: BaseException | None = error
    while link is not None:
        if getattr(link, "response", None) is not None:
            return link
        link = link.__cause__ or link.__context__
    return error.__cause__ or error


def _explain(what: str, error: BaseException) -> tuple[str, bool, float | None]:
    """The line, whether it may pass, and how many seconds the hub wants us to wait."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, OfflineModeIsEnabled) or (isinstance(error, LocalEntryNotFoundError) and offline()):
        return f"{what} is not in the cache, and HF_HUB_OFFLINE is set: run once without it", False, None
    if isinstance(error, GatedRepoError):
        return f"{what} is gated: ask for access on its page, then set HF_TOKEN to a token of that account", False, None
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such thing as {what}, or keeps it private: check the name and HF_TOKEN", False, None
    if isinstance(error, RevisionNotFoundError):
        return f"{what} has no such revision: check its name", False, None
    if isinstance(error, EntryNotFoundError) and status == 404:
        return f"the hub lacks a file of {what}: {str(error).splitlines()[0]}", False, None
    if status == 429 or (status is not None and status >= 500):
        wanted = response.headers.get("Retry-After", "") if response is not None else ""
        said = "too many requests" if status == 429 else "an error of its own"
        line = f"the hub answers {status} ({said}) for {what}: try later" + (", or set HF_TOKEN" * (status == 429))
        return line, True, float(wanted) if wanted.isdigit() else None
    if isinstance(error, RuntimeError):
        said = (str(error).splitlines() or ["hf_xet"])[0][:200]
        return f"cannot download {what}: {said}; check network and disk, or set HF_HUB_DISABLE_XET=1", False, None
    if isinstance(error, json.JSONDecodeError):
        return f"the answer for {what} is not the hub's: log in to the network, or check HF_ENDPOINT", True, None
    if status is not None:
        return f"the hub refuses {what} (HTTP {status}): check the name and HF_TOKEN", False, None
    return f"cannot download {what} ({type(error).__name__}): check the network, or set HF_HUB_OFFLINE=1", True, None


def offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def commit_of(repository: str, revision: str | None) -> str:
    """The commit that a data set's revision stands for now; offline, the one of the last time the hub was asked."""
    what, note = f"the data set {repository}", _note(repository, f"{revision or 'main'}.json".replace("/", "-"))
    if offline():
        return str(_noted(note, what)["commit"])
    from huggingface_hub import HfApi

    found = ask(what, lambda: str(HfApi().dataset_info(repository, revision=revision, timeout=20).sha))
    _keep(note, {"commit": found})
    return found


def split_of(repository: str, config: str | None, split: str, commit: str, converted: bool) -> Split:
    """Where a split lies. converted: the commit is of the hub's own Parquet conversion, `<config>/<split>/*.parquet`.

    Raises HubError, also offline when it was never asked for.
    """
    what, note = f"the data set {repository}", _note(repository, f"{commit}-{config}-{split}.json")
    if note.is_file() or offline():
        return Split(**_noted(note, what))
    find = _converted_files if converted else _published_files
    files = ask(what, lambda: find(repository, config, split, commit))
    known = (".parquet", ".json", ".jsonl")
    if not files or not all(name.endswith(known) for name in files):
        raise HubError(f"{what} has its split {split} in {files or 'no files'}: only Parquet and JSON are read")
    found = Split(repository, commit, files)
    _keep(note, asdict(found))
    return found


def with_rows(split: Split, config: str | None, name: str) -> Split:
    """The split with its rows counted, from the ends of its Parquet files: no file is downloaded."""
    if split.rows:
        return split
    what, note = f"the data set {split.repository}", _note(split.repository, f"{split.commit}-{config}-{name}.json")
    if offline():
        raise HubError(f"the rows of {what} were never counted, and HF_HUB_OFFLINE is set: run once without it")
    split.rows = [ask(what, lambda file=file: _rows(split, file)) for file in split.files]  # type: ignore[misc]
    _keep(note, asdict(split))
    return split


def file_of(split: Split, name: str) -> Path:
    """A file of the split on this machine, downloaded unless it is there."""
    from huggingface_hub import hf_hub_download

    what = f"the data set {split.repository}"
    return Path(ask(what, lambda: hf_hub_download(split.repository, name, repo_type="dataset", revision=split.commit)))


def _rows(split: Split, name: str) -> int:
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(
        f"datasets/{split.repository}@{split.commit}/{name}", block_size=1 << 16, cache_type="readahead"
    ) as file:
        return int(pq.read_metadata(file).num_rows)


def _converted_files(repository: str, config: str | None, split: str, commit: str) -> list[str]:
    from huggingface_hub import HfApi

    folder = f"{config or 'default'}/{split}"
    tree = HfApi().list_repo_tree(repository, folder, repo_type="dataset", revision=commit)
    return sorted(entry.path for entry in tree if entry.path.endswith(".parquet"))


def _published_files(repository: str, config: str | None, split: str, commit: str) -> list[str]:
    """As `datasets` finds them: by the README's configurations, else by names."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import HfApi

    try:
        builder = load_dataset_builder(repository, config, revision=commit)
        urls = (builder.config.data_files or {}).get(split, [])
    except DatasetNotFoundError:
        HfApi().auth_check(repository, repo_type="dataset")  # says why not, which datasets does not
        raise
    except json.JSONDecodeError:
        raise
    except (ValueError, RuntimeError, DataFilesNotFoundError) as error:  # no such configuration, no files, a script
        wanted = f"{config} {split}" if config else split
        raise HubError(f"the data set {repository} has no {wanted}: {str(error).splitlines()[0]}") from error
    return [str(url).split(f"@{commit}/", 1)[-1] for url in urls]


def _note(repository: str, name: str) -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("saap", namespace=repository, subfolder="splits")) / name


def _noted(note: Path, what: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise HubError(f"{what} is not in the cache, and HF_HUB_OFFLINE is set: run once without it") from error
    return found


def _keep(note: Path, value: dict[str, Any]) -> None:
    write_whole(note, json.dumps(value))
