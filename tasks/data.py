"""Where data comes from, and fingerprints of it. Light: no torch, no Prefect."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.keys import Fingerprints, digest
from tasks.hub import HubError, Split, commit_of, file_of, split_of, with_rows
from tasks.rows import check_text_column, checked_rows, needed_for, write_parquet
from tasks.toml import ConfigError

SHUFFLED_AT_ONCE = 1 << 22  # rows: as in saap.texts, which needs torch
_DRAWN = "drawn one by one"
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class DataSet:
    """One role of data: its place in a data folder (without suffix), what we read of it, and where the hub has it."""

    place: str
    hub: str
    hub_config: str | None = None
    hub_split: str = "test"
    hub_revision: str | None = None  # data sets that are loading scripts need the hub's own Parquet conversion
    columns: tuple[str, ...] = ()


class MissingData(ConfigError):
    """A role whose data is not there or cannot be had. A benchmark without its data is skipped, not an error."""


_PARQUET = "refs/convert/parquet"
_ARC = ("question", "choices", "answerKey")
DATA: dict[str, DataSet] = {
    "calibration": DataSet(
        "bookcorpus_like/passages", "bookcorpus/bookcorpus", "plain_text", "train", _PARQUET, columns=("text",)
    ),
    "recovery": DataSet("alpaca/train", "tatsu-lab/alpaca", None, "train", columns=("instruction", "input", "output")),
    "arc_easy": DataSet("arc_easy/test", "allenai/ai2_arc", "ARC-Easy", columns=_ARC),
    "arc_challenge": DataSet("arc_challenge/test", "allenai/ai2_arc", "ARC-Challenge", columns=_ARC),
    "boolq": DataSet(
        "boolq/validation", "aps/super_glue", "boolq", "validation", columns=("question", "passage", "label")
    ),
    "hellaswag": DataSet(
        "hellaswag/validation",
        "Rowan/hellaswag",
        None,
        "validation",
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "piqa": DataSet("piqa/validation", "baber/piqa", None, "validation", columns=("goal", "sol1", "sol2", "label")),
    "winogrande": DataSet(
        "winogrande/validation",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        columns=("sentence", "option1", "option2", "answer"),
    ),
    "openbookqa": DataSet(
        "openbookqa/test", "allenai/openbookqa", "main", columns=("question_stem", "choices", "answerKey")
    ),
    "wikitext2": DataSet("wikitext2_raw/test", "Salesforce/wikitext", "wikitext-2-raw-v1", columns=("text",)),
    "ptb": DataSet(
        "ptb/validation", "ptb-text-only/ptb_text_only", "penn_treebank", "validation", _PARQUET, columns=("sentence",)
    ),
}


def mini_folder() -> Path:
    """The folder of the embedded mini pack."""
    return Path(__file__).parent / "mini"


@dataclass(frozen=True)
class Found:
    """A role's data: a fingerprint that changes with its content, and its place, for stages: 'mini', a folder, or the
    hub at one commit, 'hub@…'. rows: how many it has, where that is known before a download.
    """

    fingerprint: str
    place: str
    rows: int | None = None


def is_texts(file: Path) -> bool:
    """Whether it may stand in the place of a folder for texts: a file of a kind that we read."""
    return file.suffix in SUFFIXES and file.is_file()


def data_file(data: str, role: str) -> Path:
    """A role's file in the mini pack or a folder; a file of texts is one. Raises MissingData where there is none."""
    folder = mini_folder() if data == "mini" else Path(data)
    if role == "calibration" and is_texts(folder):
        return folder
    if not folder.is_dir():
        raise ConfigError(f"data folder {folder} does not exist: data is 'mini', 'hub' or a folder")
    place = DATA[role].place
    for suffix in SUFFIXES:
        if (file := folder / f"{place}{suffix}").is_file():
            return file
    raise MissingData(
        f"{folder} has no {place}.parquet (or .jsonl), needed for {needed_for(role)}: put it there and run again"
    )


def find_data(data: str, role: str, fingerprints: Fingerprints) -> Found:
    """Look at a role's data; files are read and checked, on the hub the commit is asked for.

    Raises MissingData when it is not there or the hub cannot be asked, ConfigError when it cannot be used, with file,
    row and column.
    """
    if data == "hub":
        about = DATA[role]
        with _from_hub():
            commit = commit_of(about.hub, about.hub_revision)
        fields = [about.hub, about.hub_config, about.hub_split, commit]
        return Found(digest([*fields, _DRAWN] if role == "calibration" else fields), f"hub@{commit}")
    file = data_file(data, role)
    rows = check_file(file, role)
    found = fingerprints.file(file)
    if role == "calibration" and rows > SHUFFLED_AT_ONCE:  # such a set was once shuffled whole
        found = digest([found, _DRAWN])
    return Found(found, data, rows)


def data_name(data: str) -> str:
    """What tables show: mini, hub, or the folder's name."""
    return "hub" if _is_hub(data) else data if data == "mini" else Path(data).resolve().name


def check_file(file: Path, role: str) -> int:
    """How many rows a data file has. Raises ConfigError when one is not as the role needs it: before anything runs."""
    columns = DATA[role].columns
    if file.suffix == ".parquet" and role == "calibration":  # too large to be read
        return check_text_column(file, role, columns[0])
    return sum(1 for _ in checked_rows(file, role, columns))


def read_data(data: str, role: str) -> list[dict[str, Any]]:
    """All rows of a role, its columns only, in the official form; `data` is the place of what was found.

    Raises MissingData when the hub's cannot be downloaded.
    """
    columns = DATA[role].columns
    rows = (row for file in _files(data, role) for row in checked_rows(file, role, columns))
    return [{column: row[column] for column in columns} for row in rows]


@contextmanager
def benchmark_file(data: str, role: str) -> Iterator[Path]:
    """A Parquet file with all rows of a benchmark in the official form, as long as the context lasts."""
    columns = DATA[role].columns
    rows = [row for file in _files(data, role) for row in checked_rows(file, role, columns)]
    with TemporaryDirectory() as folder:
        yield write_parquet(rows, columns, Path(folder) / f"{role}.parquet")


def calibration_texts(data: str) -> Sequence[str]:
    """The texts to draw from. Of Parquet only what is drawn is read, and of the hub's files downloaded."""
    from saap.corpus import ParquetTexts

    column = DATA["calibration"].columns[0]
    if _is_hub(data):
        about = DATA["calibration"]
        split = _split(data, "calibration")
        if all(name.endswith(".parquet") for name in split.files):
            with _from_hub():
                split = with_rows(split, about.hub_config, about.hub_split)
            return ParquetTexts(split.rows, lambda number: file_of(split, split.files[number]), column)
    elif (file := data_file(data, "calibration")).suffix == ".parquet":
        return ParquetTexts.of_files([file], column)
    return [row[column] for row in read_data(data, "calibration")]


def _files(data: str, role: str) -> list[Path]:
    """The files of a role on this machine, in order."""
    if not _is_hub(data):
        return [data_file(data, role)]
    split = _split(data, role)
    with _from_hub():
        return [file_of(split, name) for name in split.files]


def _split(data: str, role: str) -> Split:
    about = DATA[role]
    with _from_hub():
        commit = data.partition("@")[2] or commit_of(about.hub, about.hub_revision)
        return split_of(about.hub, about.hub_config, about.hub_split, commit, about.hub_revision == _PARQUET)


def _is_hub(data: str) -> bool:
    return data == "hub" or data.startswith("hub@")


@contextmanager
def _from_hub() -> Iterator[None]:
    try:
        yield
    except HubError as error:
        raise MissingData(f"{error}; or set data to 'mini' or to a folder with the data sets") from error
