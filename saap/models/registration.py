"""Our model types in transformers' Auto classes, as soon as saap is imported; their code follows when one is met."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig

# the file that defines a model type → the dense types it has uneven models of
DEFINED_IN = {
    "modeling": ("llama", "mistral", "qwen2", "qwen3"),
    "modeling_baichuan": ("baichuan",),
    "modeling_bloom": ("bloom",),
    "modeling_experts": ("gpt_oss", "mixtral", "qwen3_moe"),
    "modeling_families": (
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "ministral3",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen3_5_text",
        "smollm3",
    ),
}


class _Deferred:
    """Stands for a config class until transformers makes a config of its type."""

    model_type: str
    module: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real().from_dict(*args, **kwargs)

    @classmethod
    def _real(cls) -> Any:
        module = import_module(f"saap.models.{cls.module}")  # it registers the config and the model class over this one
        return next(found for found in vars(module).values() if getattr(found, "model_type", None) == cls.model_type)


def register_types() -> None:
    """Make AutoConfig and AutoModelForCausalLM know our model types without importing the models."""
    for module, kinds in DEFINED_IN.items():
        for kind in (f"saap_{dense}" for dense in kinds):
            AutoConfig.register(kind, type(kind, (_Deferred,), {"model_type": kind, "module": module}), exist_ok=True)
