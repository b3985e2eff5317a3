"""A run on the screen: one line a stage, made from Prefect's log records and shown in their place."""

import logging
import re
import sys
from typing import Literal, TextIO

Loudness = Literal["quiet", "normal", "verbose"]
WIDTH = 100
IN_STORE = "found in the store"
_SAID_BY_US = re.compile("^Finished in state Failed|^(Crash detected|Finished in state Crashed).* an interrupt signal")


def show_progress(loudness: Loudness, steps: int | None = None) -> None:
    """Show stage lines in the place of Prefect's console lines; its UI still gets all of those. verbose: keep them.

    steps: how many the run has, where that is known. Warnings and errors are always shown.
    """
    if loudness == "verbose":
        return
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    setup_logging()
    lines = StageLines(sys.stderr, steps, quiet=loudness == "quiet")
    for name in (None, *logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, PrefectConsoleHandler):
                handler.addFilter(lines)


class StageLines(logging.Filter):
    """Lets warnings through. Of the rest it makes '[ 3/13]  12 s  score  samples 50, groups 46170' itself.

    So it does of a step that fails: what Prefect says of it, and of its runs, would be the same line again.
    """

    def __init__(self, out: TextIO, steps: int | None, quiet: bool) -> None:
        super().__init__()
        self._out, self._steps, self._quiet = out, steps, quiet
        self._done = 0
        self._group, self._count, self._seconds, self._line = ("", ""), 0, 0.0, ""

    def filter(self, record: logging.LogRecord) -> bool:
        its_runs = getattr(record, "its_runs", "")
        if hasattr(record, "failed"):
            label, error = record.args  # type: ignore[misc]
            self._failed(str(label), error, its_runs)
        elif record.levelno >= logging.WARNING:
            if hasattr(record, "one_line") or _SAID_BY_US.search(record.getMessage()):
                return False
            self._end_line()
            return True
        elif hasattr(record, "seconds"):
            label, found = record.args  # type: ignore[misc]
            self._step(str(label), str(found), record.seconds, its_runs)
        elif record.name == "prefect.flow_runs" and record.getMessage().startswith("Finished in state"):
            self._end_line()
        return False

    def _failed(self, label: str, error: object, its_runs: str) -> None:
        self._end_line()
        self._done += 1
        self._write(f"{self._number()}  failed  {label:<19} {_of(its_runs)}{str(error).partition(chr(10))[0]}")
        self._end_line()

    def _number(self) -> str:
        return f"[{self._done:>2}{f'/{self._steps}' if self._steps else ''}]"

    def _step(self, label: str, found: str, seconds: float, its_runs: str) -> None:
        self._done += 1
        stage, _, rest = label.partition(" ")
        variant, _, benchmark = rest.partition(" ")
        group = f"{stage} {variant}".strip()
        if (group, its_runs) != self._group:
            self._end_line()
            self._group, self._count, self._seconds = (group, its_runs), 0, 0.0
        self._count += 1
        self._seconds += seconds
        if benchmark:
            last = found if found == IN_STORE else f"{benchmark} last"
            found = f"{self._count} benchmark{'s' if self._count > 1 else ''}, {last}"
        self._write(f"{self._number()} {self._seconds:>5.0f} s  {group:<19} {_of(its_runs)}{found}")
        if not benchmark:
            self._end_line()

    def _write(self, text: str) -> None:
        if self._quiet:
            return
        terminal = self._out.isatty()
        self._line = f"{text[: WIDTH - 1]}…" if terminal and len(text) > WIDTH else text
        if terminal:
            print(f"\r\x1b[K{self._line}", end="", file=self._out, flush=True)

    def _end_line(self) -> None:
        """Leave the line of the stage before, over which a bar may have been drawn; a file gets each line once."""
        line, self._line = self._line, ""
        self._group = ("", "")
        if line:
            print(f"\r\x1b[K{line}" if self._out.isatty() else line, file=self._out, flush=True)


def _of(its_runs: str) -> str:
    return f"({its_runs}) " if its_runs else ""
