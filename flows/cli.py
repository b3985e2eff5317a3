"""The `saap` command. Heavy imports (torch, Prefect) happen inside the commands that need them."""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from flows.commands import export, hygiene, remote, report, run, store

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make large language models smaller and faster: score, prune, recover in int4, evaluate, measure.\n\n"
    "Start with [bold]saap run configs/demo.toml[/bold]; look at the result with "
    '[bold]saap sql "select * from leaderboard"[/bold].',
    epilog="Exit codes: 0 done; 1 something is damaged or missing (verify, doctor), or a bug; 2 something to put "
    "right, said in one line; 130 interrupted, the same command goes on from there.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(run.run, run.sweep, run.plan, run.compare, run.config),
    *(report.report, report.show, report.diff),
    *(store.sql, store.rebuild, store.verify, store.doctor),
    *(remote.push, remote.pull),
    *(hygiene.gc, hygiene.du),
)
INTERRUPTED = 130
for command in COMMANDS:
    app.command()(command)
app.add_typer(export.app, name="export")


def main() -> None:
    """Entry point: errors that carry an exit code are for the user and end in one line."""
    code: Any = 0
    try:
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
