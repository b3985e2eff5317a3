"""The architectures we can prune. A new one is a file beside `llama.py` and an entry in `FAMILIES`."""

from typing import Any

from saap.errors import SaapError

from .baichuan import Baichuan
from .base import Family, Part
from .bloom import Bloom
from .llama import Llama
from .mistral import Mistral
from .qwen import Qwen2, Qwen3

FAMILIES: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3(), Bloom(), Baichuan())


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises SaapError for a model type we do not know."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise SaapError(f"model family '{config.model_type}' is not supported; known: {known}")


__all__ = ["FAMILIES", "Family", "Part", "family_of"]
