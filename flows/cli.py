"""The `saap` command: what an error, or a Ctrl-C at any time, ends in."""

import os
import sys
from typing import Any

INTERRUPTED = 130


def main() -> None:
    """Entry point: errors that carry an exit code are for the user and end in one line."""
    code: Any = 0
    try:
        from flows.commands import app

        app(prog_name="saap")
    except SystemExit as leaving:
        code = leaving.code  # a Ctrl-C inside a command is 130 here: Typer has caught it
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code, said = getattr(error, "exit_code", None), str(error)
        if code is None and isinstance(error, PermissionError):
            code, said = 2, f"{error.filename}: {error.strerror}: saap needs the right to use it"
        if code is None:
            raise
        print(f"saap: {said}", file=sys.stderr)
    if code == INTERRUPTED:
        start = "\n" if sys.stderr.isatty() else ""  # behind the terminal's ^C
        print(f"{start}saap: interrupted; the same command goes on from here", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # Prefect's threads would outlive the clean-up, and DuckDB would complain


if __name__ == "__main__":
    main()
