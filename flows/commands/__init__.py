"""The commands of `saap`, by what they work on, and the program that they make.

Heavy imports (torch, Prefect) happen inside the commands that need them.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

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


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"saap {version('saap')}")
        raise typer.Exit


@app.callback()
def program(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version of saap.", callback=print_version, is_eager=True)
    ] = False,
) -> None: ...


COMMANDS: tuple[Callable[..., None], ...] = (
    *(run.run, run.sweep, run.plan, run.compare, run.config),
    *(report.report, report.show, report.diff),
    *(store.sql, store.rebuild, store.verify, store.doctor),
    *(remote.push, remote.pull),
    *(hygiene.gc, hygiene.du),
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(export.app, name="export")
