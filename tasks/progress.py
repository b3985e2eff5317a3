"""How far a step is, in Prefect's UI."""

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

EVERY = 5.0  # seconds: shorter steps show nothing


@contextlib.contextmanager
def shown_progress(label: str) -> Iterator[None]:
    """Follow the bars of the library in the block with a progress artifact of the task run.

    A thread of its own sends it, so that a slow server delays no work.
    """
    over, last = threading.Event(), _Last()
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_send, label, over, last), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        if last.shown:
            thread.join(timeout=EVERY)


class _Last:
    """What the listener was told last."""

    def __init__(self) -> None:
        self.what, self.share, self.shown = "", 0.0, False

    def take(self, what: str, done: float, of: float | None) -> None:
        if of:
            self.what, self.share = what, min(1.0, done / of)


def _send(label: str, over: threading.Event, last: _Last) -> None:
    if over.wait(EVERY):
        return
    from saap import progress

    artifact: Any = None
    progress.listener = last.take
    try:
        while not over.wait(EVERY):
            text = f"{label}: {last.what}" if last.what else label
            if artifact is None:
                last.shown = True
                artifact = create_progress_artifact(100 * last.share, description=text)
            else:
                update_progress_artifact(artifact, 100 * last.share, description=text)
        if artifact is not None:
            update_progress_artifact(artifact, 100.0, description=label)
    except Exception as error:  # the work goes on without it
        get_run_logger().warning("no progress in the UI: %s", error)
    finally:
        progress.listener = None
