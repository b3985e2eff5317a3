"""The model types that can be pruned, known without importing the library (torch), so that a plan refuses others."""

import json
from pathlib import Path
from typing import Any

from tasks.config import ConfigError

# as transformers calls them; saap.models.families says what each is, and a test holds the two together
KNOWN = (
    "bloom",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "smollm3",
)
MODEL_TYPES = (*KNOWN, "baichuan", *(f"saap_{name}" for name in (*KNOWN, "baichuan")))


def check_family(folder: Path) -> dict[str, Any]:
    """The fields of config.json in `folder`. Raises ConfigError when it cannot be read or is of another family."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {folder}/config.json, which must be JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{folder}/config.json is no JSON object")
    if (name := fields.get("model_type")) not in MODEL_TYPES:
        raise ConfigError(
            f"model family '{name}' in {folder} is not supported; known: {', '.join((*KNOWN, 'baichuan'))}"
        )
    return fields
