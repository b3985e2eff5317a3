"""Commands that show what runs found: report, show, diff."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.store import StoreOption
from flows.printing import console, print_run

RunArgument = Annotated[
    str | None,
    typer.Argument(help="Run id, or its begin or end; the newest completed run when absent.", show_default=False),
]


def report(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|SWEEP]",
            help="A run id or its begin or end, a sweep's TOML file, or the name of its runs. The newest completed run "
            "when absent.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = Path("saap_store"),
    html: Annotated[
        Path | None, typer.Option(help="Write the page with charts and tables here.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of a sweep's file: the fields it was started with.", show_default=False),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the table into this SVG file.", show_default=False)] = None,
) -> None:
    """Print the result table of a run again, and write its page; or the page of a sweep.

    The page is one HTML file that needs no network. A run's lies in the store, beside its record, unless --html says
    where; a sweep's goes to NAME.html.
    """
    from flows.pages.write import write_report, write_sweep
    from flows.targets import find_run, sweep_of_file, sweep_of_name
    from storage.errors import StorageError
    from storage.warehouse import Warehouse

    if svg is not None and not svg.absolute().parent.is_dir():
        raise StorageError(f"there is no folder {svg.absolute().parent} to write {svg.name} in")
    sweep = None
    with Warehouse(store).reading() as connection:
        if target and target.endswith(".toml"):
            sweep = sweep_of_file(connection, Path(target), tuple(set_ or ()))
        elif target:
            sweep = sweep_of_name(connection, target)
        if sweep is None:
            run_id = find_run(connection, store, target)
            ((data,),) = connection.execute("select data from runs where run_id = ?", [run_id]).fetchall()
    if sweep is not None:
        file = write_sweep(store, sweep.title, sweep.run_ids, html or Path(f"{sweep.title}.html"), sweep.missing)
        console.print(f"{len(sweep.run_ids)} runs, {sweep.missing} not made yet", highlight=False)
    else:
        console.record = svg is not None
        print_run(store, run_id, data)
        if svg is not None:
            try:
                console.save_svg(str(svg), title="saap report")
            except OSError as error:
                raise StorageError(f"cannot write {svg}: {error.strerror}") from error
        file = write_report(store, run_id, html)
    console.print(f"page: {file.resolve()}", highlight=False, soft_wrap=True)
