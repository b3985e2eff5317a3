"""Types for settings, with bounds that no real use exceeds."""

import shlex
from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _plain(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if len(text) > 4096 or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("must be one line of at most 4,096 characters")
    return text


def _arguments(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into arguments ({error})") from error
    return text


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """For AfterValidator: the values, each at most once."""
    if len(set(values)) < len(values):
        raise ValueError("must not name one thing twice")
    return values


Text = Annotated[str, AfterValidator(_plain)]
Arguments = Annotated[Text, AfterValidator(_arguments)]  # of a command line
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # of examples, tokens, steps, channels: more than any real use
Amount = Annotated[int, Field(ge=1, le=10**12)]  # of the first so many of what there is
Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Layer = Annotated[int, Field(ge=-4096, lt=4096)]
