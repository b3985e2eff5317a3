"""Moves what is damaged to `<root>/damaged/`, with a warning, so that it is no longer found."""

import logging
import uuid
from pathlib import Path

log = logging.getLogger("saap.storage")


def move_aside(root: Path, path: Path, name: str, what: str, fault: str) -> None:
    """Move a file or folder to `<root>/damaged/<name>-…`. Where the store cannot be written it is only left out."""
    aside = root / "damaged" / f"{name}-{uuid.uuid4().hex[:8]}{path.suffix if path.is_file() else ''}"
    try:
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
    except FileNotFoundError:
        return  # another process has moved it already
    except OSError as error:
        log.warning("%s is damaged (%s) and left out: it cannot be moved aside (%s)", what, fault, error.strerror)
    else:
        log.warning("%s is damaged (%s): moved to %s; the next run makes it again", what, fault, aside)
