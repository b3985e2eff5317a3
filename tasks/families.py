"""The model types that can be pruned, known without importing the library (torch), so that a plan refuses others."""

import json
from pathlib import Path

from tasks.config import ConfigError

# as transformers calls them; saap.models.families says what each is, and a test holds the two together
DENSE = (
    "bloom",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "smollm3",
)
MODEL_TYPES = (*DENSE, "baichuan", *(f"saap_{name}" for name in (*DENSE, "baichuan")))


def check_family(folder: Path) -> None:
    """Raises ConfigError when config.json in `folder` cannot be read or is of a family we cannot prune."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = fields.get("model_type")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"cannot read {folder}/config.json: {error or type(error).__name__}") from error
    if name not in MODEL_TYPES:
        raise ConfigError(
            f"model family '{name}' in {folder} is not supported; known: {', '.join((*DENSE, 'baichuan'))}"
        )
