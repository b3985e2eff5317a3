"""Inputs that several stages share: models, tokenizers, data sets."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.artifact import Artifact
from tasks.compute import compute_settings
from tasks.families import check_family
from tasks.memory import give_back
from tasks.step import Step

if TYPE_CHECKING:
    from torch import nn


class Gguf(Artifact):
    """A GGUF file."""


class Tokenizer(Artifact):
    """A folder with a tokenizer."""


class Weights(Artifact):
    """A folder with a model: safetensors and config.json."""


class Data(Artifact):
    """'mini', a folder of data sets, or the hub at one commit: 'hub@…'."""

    @property
    def name(self) -> str:
        return str(self.place)


class Checkpoint(Tokenizer, Weights):
    """A model and its tokenizer. Takes two places in a key, the second one under the name 'tokenizer'."""


def load_model(
    step: Step,
    checkpoint: Checkpoint,
    *,
    float_weights: bool = False,
    use: Literal["whole", "layers", "slices"] = "whole",
) -> "nn.Module":
    """The model of an input, on the step's device.

    float_weights replaces int4 layers by float ones of the same values. use: with compute.offload, a model that is used
    layer by layer leaves the weights of its layers on disk, and one that is only sliced stays on the CPU. The last
    model stays loaded for the next step: do not change it.
    """
    settings = compute_settings(step)
    offload = settings["offload"] and use == "layers"
    device = "cpu" if settings["offload"] and use == "slices" else settings["device"]
    from saap import choose_heads

    config = step.config()
    model = _load_model(checkpoint.place, config["dtype"], device, float_weights, offload)
    choose_heads(model, config.get("heads", "kv"))
    return model


def load_tokenizer(step: Step) -> Any:
    """The tokenizer that goes with the step's checkpoint."""
    return _load_tokenizer(step.place("tokenizer"))


def calibration_bos(step: Step) -> int | None:
    """What the text to rank by begins with, for the model and tokenizer of the step's checkpoint."""
    import saap

    return saap.calibration_bos(check_family(step.place("tokenizer"))["model_type"], load_tokenizer(step))


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path) -> Any:
    from saap import load_tokenizer

    return load_tokenizer(folder)


_kept: dict[tuple[Any, ...], "nn.Module"] = {}  # the last model, by what it was loaded with


def _load_model(*how: Any) -> "nn.Module":
    from saap import dequantize, load
    from saap.models.checkpoint import check_finite

    if how not in _kept:
        forget_model()  # first: two models at once may not fit
        folder, dtype, device, float_weights, offload = how
        model = load(folder, dtype=dtype, device=device, offload=offload)
        check_finite(model, folder)
        _kept[how] = dequantize(model) if float_weights else model
    return _kept[how]


def forget_model() -> None:
    """Release the model that `load_model` keeps."""
    _kept.clear()
    give_back()
