"""Commands that show what runs found: report, show, diff."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.store import StoreOption
from flows.printing import console, print_run, print_table
from flows.targets import complete_run, find_run, store_of, sweep_of_file, sweep_of_name

RUN = "A run: its id, or how that begins or ends."
RunArgument = Annotated[
    str | None,
    typer.Argument(
        help=f"{RUN} The newest completed one when absent.", show_default=False, autocompletion=complete_run
    ),
]
NamedRun = Annotated[str, typer.Argument(help=RUN, show_default=False, autocompletion=complete_run)]


def report(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|SWEEP]",
            help="A run id or its begin or end, a sweep's TOML file, or the name of its runs. The newest completed run "
            "when absent.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            envvar="SAAP_STORE",
            help="Folder with the artifacts and the warehouse; saap_store, or the one that a sweep's file names, when "
            "absent.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page with charts and tables here.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of a sweep's file: the fields it was started with.", show_default=False),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the table of a run into this SVG file.", show_default=False)
    ] = None,
) -> None:
    """Print the result table of a run again, and write its page; or the page of a sweep.

    The page is one HTML file that needs no network. A run's lies in the store, beside its record, unless --html says
    where; a sweep's goes to NAME.html.
    """
    from flows.pages.render import write
    from flows.pages.write import page_of_run, page_of_sweep, report_file
    from storage.errors import StorageError
    from storage.warehouse import Warehouse

    if svg is not None and not svg.absolute().parent.is_dir():
        raise StorageError(f"there is no folder {svg.absolute().parent} to write {svg.name} in")
    if store is None:
        store = store_of(Path(target), tuple(set_ or ())) if target and target.endswith(".toml") else Path("saap_store")
    sweep, warehouse = None, Warehouse(store)
    with warehouse.reading() as connection:
        if target and target.endswith(".toml"):
            sweep = sweep_of_file(connection, Path(target), tuple(set_ or ()))
        elif target:
            sweep = sweep_of_name(connection, target)
        if sweep is not None and svg is not None:
            raise StorageError("--svg draws the table of a run; of a sweep: saap compare FILE --figure sweep.svg")
        if sweep is None:
            run_id = find_run(connection, store, target)
            ((data,),) = connection.execute("select data from runs where run_id = ?", [run_id]).fetchall()
            text = page_of_run(warehouse, connection, run_id)
        else:
            text = page_of_sweep(store, connection, sweep)
    if sweep is not None:
        file = write(html or Path(f"{sweep.title}.html"), text)
        console.print(f"{len(sweep.run_ids)} runs, {sweep.missing} not made yet", highlight=False)
        console.print(f"page: {file.resolve()}", highlight=False, soft_wrap=True)
    else:
        console.record = svg is not None
        page = None
        try:
            page = write(html or report_file(store, run_id), text)
        except StorageError as error:  # the table is shown all the same of a store to read only
            if html is not None:
                raise
            console.print(f"no page: {error}", highlight=False, soft_wrap=True)
        print_run(store, run_id, data, page)
        if svg is not None:
            try:
                console.save_svg(str(svg), title="saap report")
            except OSError as error:
                raise StorageError(f"cannot write {svg}: {error.strerror}") from error


def show(run_id: RunArgument = None, store: StoreOption = Path("saap_store")) -> None:
    """Say what a run was, where its files lie, and how to load its checkpoints."""
    from flows.pages.run_head import checkpoints
    from flows.pages.write import report_file
    from storage.artifacts import ArtifactStore
    from storage.hints import in_store
    from storage.warehouse import Warehouse

    with Warehouse(store).reading() as connection:
        found = find_run(connection, store, run_id)
        columns = "name, status, model, data, criterion, ratio, started_at, finished_at - started_at, error"
        ((*values, error),) = connection.execute(f"select {columns} from runs where run_id = ?", [found]).fetchall()
        folders = checkpoints(ArtifactStore(store), connection, found)
        sizes = connection.execute(
            "select variant, parameters, active_parameters from speed where run_id = ? "
            "order by list_position(['dense', 'pruned', 'recovered'], variant) nulls last, variant",
            [found],
        ).fetchall()
    names = ("name", "status", "model", "data", "criterion", "ratio", "started (UTC)", "took")
    page = report_file(store, found)
    rows: list[tuple[str, object]] = [("run", found)]
    rows += [(name, str(value).partition(".")[0] if name in ("started (UTC)", "took") else value)
             for name, value in zip(names, values, strict=True) if value is not None]  # fmt: skip
    rows += [("error", error)] if error else []
    rows += [(f"{variant} parameters", f"{parameters:,}" + (f", active {active:,}" if active not in (None, parameters)
              else "")) for variant, parameters, active in sizes if " in " not in variant]  # fmt: skip
    rows += [(f"{variant} checkpoint", folder) for variant, folder in folders]
    rows.append(("page", page if page.exists() else f"saap report {found} {in_store(store)} writes it"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
    if folders:
        last = str(folders[-1][1])
        print(f"\nimport saap, transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained({last!r})")
        print(f"\nsaap export gguf {found} model.gguf {in_store(store)}")


def diff(first: NamedRun, second: NamedRun, store: StoreOption = Path("saap_store")) -> None:
    """Show what two runs differ in: configuration, stages, numbers and whether those are more than noise."""
    from flows.differences import configuration, numbers, stages
    from storage.warehouse import Warehouse

    with Warehouse(store).reading() as connection:
        a, b = (find_run(connection, store, named) for named in (first, second))
        tables = [(what, found(connection, a, b)) for what, found in
                  (("configuration", configuration), ("stages", stages), ("numbers", numbers))]  # fmt: skip
    for what, (columns, rows) in tables:
        if rows:
            print_table(columns, rows, title=what)
        else:
            console.print(f"{what}: no difference", highlight=False)
