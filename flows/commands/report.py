"""Commands that show what runs found: report."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.store import StoreOption
from flows.printing import console, print_run


def report(
    run_id: Annotated[str | None, typer.Argument(help="The newest completed run when absent.")] = None,
    store: StoreOption = Path("saap_store"),
    svg: Annotated[Path | None, typer.Option(help="Draw it into this SVG file too.", show_default=False)] = None,
) -> None:
    """Print the result table of a run again."""
    from storage.errors import StorageError
    from storage.warehouse import Warehouse

    if svg is not None and not svg.absolute().parent.is_dir():
        raise StorageError(f"there is no folder {svg.absolute().parent} to write {svg.name} in")
    with Warehouse(store).reading() as connection:
        found = connection.execute(
            "select run_id, data from runs where coalesce(run_id = ?, status = 'completed') "
            "order by started_at desc limit 1",
            [run_id],
        ).fetchone()
    if found is None:
        raise StorageError(f"no such run in {store.resolve()}: saap sql 'select run_id, name, status from runs'")
    console.record = svg is not None
    print_run(store, *found)
    if svg is not None:
        try:
            console.save_svg(str(svg), title="saap report")
        except OSError as error:
            raise StorageError(f"cannot write {svg}: {error.strerror}") from error
