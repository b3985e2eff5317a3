"""Where data comes from, and fingerprints of it. Light: no torch, no Prefect."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.keys import Fingerprints, digest
from tasks.config import ConfigError


@dataclass(frozen=True)
class DataSet:
    """One role of data: its place in a data folder (without suffix), what we read of it, and where the hub has it."""

    place: str
    columns: tuple[str, ...]
    hub: str
    hub_config: str | None = None
    hub_split: str = "test"
    hub_revision: str | None = None  # data sets that are loading scripts need the hub's own Parquet conversion


class MissingData(ConfigError):
    """A role whose data is not there or cannot be had. A benchmark without its data is skipped, not an error."""


_ARC = ("question", "choices", "answerKey")
_PARQUET = "refs/convert/parquet"
DATA: dict[str, DataSet] = {
    "calibration": DataSet(
        "bookcorpus_like/passages", ("text",), "bookcorpus/bookcorpus", "plain_text", "train", _PARQUET
    ),
    "recovery": DataSet("alpaca/train", ("instruction", "input", "output"), "tatsu-lab/alpaca", None, "train"),
    "arc_easy": DataSet("arc_easy/test", _ARC, "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": DataSet("arc_challenge/test", _ARC, "allenai/ai2_arc", "ARC-Challenge"),
    "boolq": DataSet("boolq/validation", ("question", "passage", "label"), "aps/super_glue", "boolq", "validation"),
    "hellaswag": DataSet(
        "hellaswag/validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        "Rowan/hellaswag",
        None,
        "validation",
    ),
    "piqa": DataSet("piqa/validation", ("goal", "sol1", "sol2", "label"), "baber/piqa", None, "validation"),
    "winogrande": DataSet(
        "winogrande/validation",
        ("sentence", "option1", "option2", "answer"),
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
    ),
    "openbookqa": DataSet("openbookqa/test", ("question_stem", "choices", "answerKey"), "allenai/openbookqa", "main"),
    "wikitext2": DataSet("wikitext2_raw/test", ("text",), "Salesforce/wikitext", "wikitext-2-raw-v1"),
    "ptb": DataSet(
        "ptb/validation", ("sentence",), "ptb-text-only/ptb_text_only", "penn_treebank", "validation", _PARQUET
    ),
}


def mini_folder() -> Path:
    """The folder of the embedded mini pack."""
    return Path(__file__).parent / "mini"


def data_file(data: str, role: str) -> Path | None:
    """The local file of a role, or None for the hub. Raises MissingData when a folder lacks it."""
    if data == "hub":
        return None
    folder = mini_folder() if data == "mini" else Path(data)
    if not folder.is_dir():
        raise ConfigError(f"data folder {folder} does not exist: data is 'mini', 'hub' or a folder")
    place = DATA[role].place
    for suffix in (".parquet", ".jsonl"):
        if (file := folder / f"{place}{suffix}").is_file():
            return file
    raise MissingData(f"{folder} has no {place}.parquet (or .jsonl), needed for {role}: put it there and run again")


def data_fingerprint(data: str, role: str, fingerprints: Fingerprints) -> str:
    """Changes when the content of the role's data changes.

    Raises MissingData when it is not there or the hub cannot be asked, ConfigError when it cannot be used.
    """
    file = data_file(data, role)
    if file is not None:
        check_columns(file, role)
        return fingerprints.file(file)
    return digest([DATA[role].hub, DATA[role].hub_config, DATA[role].hub_split, _hub_revision(role)])


def data_name(data: str) -> str:
    """What tables show: mini, hub, or the folder's name."""
    return data if data in ("mini", "hub") else Path(data).resolve().name


def check_columns(file: Path, role: str) -> None:
    """Raises ConfigError when a data file is damaged or lacks a column: before anything runs, not hours into it."""
    wanted = DATA[role].columns
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            present = set(pq.read_schema(file).names)
        else:
            with file.open(encoding="utf-8") as stream:
                present = set(json.loads(stream.readline()))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
    missing = [column for column in wanted if column not in present]
    if missing:
        raise ConfigError(f"{file} lacks the column {', '.join(missing)}, needed for {role}; it has {sorted(present)}")


def read_data(data: str, role: str) -> list[dict[str, Any]]:
    """All rows of a role that is read as text (calibration, recovery, wikitext2, ptb), from a file or the hub.

    Raises MissingData when the hub's cannot be downloaded.
    """
    from saap.texts import read_rows

    columns = DATA[role].columns
    file = data_file(data, role)
    if file is not None:
        return read_rows(file, columns)
    from datasets import load_dataset

    about = DATA[role]
    try:
        rows = load_dataset(about.hub, about.hub_config, split=about.hub_split, revision=about.hub_revision)
    except OSError as error:
        if error.errno is not None:  # of this machine's disk, not of the hub
            raise
        raise MissingData(f"cannot download {about.hub} ({type(error).__name__}): check the network") from error
    return list(rows.select_columns(list(columns)))


def _hub_revision(role: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(DATA[role].hub, revision=DATA[role].hub_revision, timeout=20).sha)
    except (HfHubHTTPError, OSError, ConnectionError) as error:
        raise MissingData(
            f"cannot reach the hub for {DATA[role].hub} ({type(error).__name__}): check the network, or set data to "
            "'mini' or to a folder with the data sets"
        ) from error
