"""What a step has freed goes back to the system."""

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Let the C library return what it holds of freed memory.

    By itself glibc keeps what lies below memory still in use: a model's worth after some stages, beside the next one's.
    Other libraries are left to their own ways.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library by that name
        return None
