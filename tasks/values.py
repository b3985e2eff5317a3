"""Types for settings, with bounds that no real use exceeds."""

import re
import shlex
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


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


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9, "x": 1.0}


def parse_target(text: str) -> tuple[str, float]:
    """What a target is of ('parameters', 'bytes' or 'speed') and how much: '80M' is ('parameters', 8e7).

    Raises ValueError for another text.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(K|M|B|KB|MB|GB|x)", text)
    if found is None or not float(found[1]):
        raise ValueError("must be parameters, as in '80M', bytes of weights, as in '120MB', or a speed, as in '1.5x'")
    what = "speed" if found[2] == "x" else "bytes" if len(found[2]) == 2 else "parameters"
    if what == "speed" and float(found[1]) <= 1:
        raise ValueError("must be above '1x', the speed of the dense model")
    return what, float(found[1]) * _UNITS[found[2]]


def _target(value: Any) -> Any:
    if value is not None:
        parse_target(str(value))
    return value


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """For AfterValidator: the values, each at most once."""
    if len(set(values)) < len(values):
        raise ValueError("must not name one thing twice")
    return values


Text = Annotated[str, AfterValidator(_plain)]
Arguments = Annotated[Text, AfterValidator(_arguments)]  # of a command line
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # of examples, tokens, steps, channels: more than any real use
Amount = Annotated[int, Field(ge=1, le=10**12)]  # of the first so many of what there is
Target = Annotated[str, BeforeValidator(_target)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Layer = Annotated[int, Field(ge=-4096, lt=4096)]
