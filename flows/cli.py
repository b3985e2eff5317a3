"""The `saap` command. Heavy imports (torch, Prefect) happen inside the commands that need them."""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows import export
from tasks.config import ConfigError, RunConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make large language models smaller and faster: score, prune, recover in int4, evaluate, measure.\n\n"
    "Start with [bold]saap run configs/demo.toml[/bold]; look at the result with "
    '[bold]saap sql "select * from leaderboard"[/bold].',
)
app.add_typer(export.app, name="export")
# a pipe or a file has no width of its own: let nothing be cut there
console = Console(width=None if sys.stdout.isatty() else 200, markup=False)

ConfigArgument = Annotated[Path, typer.Argument(help="TOML file; see configs/ for examples.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set prune.ratio=0.5. May be repeated.", show_default=False),
]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="SAAP_STORE", help="Folder with the artifacts and the warehouse.")
]
RunStoreOption = Annotated[
    Path | None,
    typer.Option("--store", envvar="SAAP_STORE", help="Store to use instead of the config's.", show_default=False),
]


def _overrides(values: list[str] | None, store: Path | None) -> tuple[str, ...]:
    return (*(values or ()), *([f'store="{store}"'] if store else []))


@app.command()
def run(config: ConfigArgument, set_: SetOption = None, store: RunStoreOption = None) -> None:
    """Run the whole job: calibrate, score, fuse, fluctuation, prune, recover, evaluate, speed.

    Stages whose artifacts are in the store are not run again: an interrupted run goes on where it was when the same
    command is given again. Uses the Prefect server at PREFECT_API_URL, or one of its own for as long as it runs.
    """
    from flows.dag import build
    from tasks.config import load_config

    overrides = _overrides(set_, store)
    settings = load_config(config, overrides)
    _start(settings.store)
    build(settings)  # what is wrong with model or data shows before a server is started
    _check_family(settings)
    with _prefect(Path(settings.store)):
        from flows.run import saap_run

        run_id = saap_run(str(config.resolve()), list(overrides))
    _print_run(Path(settings.store), run_id, settings.data)


@app.command()
def sweep(config: ConfigArgument, set_: SetOption = None, store: RunStoreOption = None) -> None:
    """Run every combination of the lists in the config's \\[sweep] table; what they share is computed once."""
    from flows.sweep import combinations
    from tasks.config import load_config

    overrides = _overrides(set_, store)
    settings = load_config(config, overrides)
    runs = combinations(str(config))
    _start(settings.store)
    console.print(f"{len(runs)} runs, the last of them {', '.join(runs[-1])}", highlight=False)
    with _prefect(Path(settings.store)):
        from flows.sweep import saap_sweep

        saap_sweep(str(config.resolve()), list(overrides))
    _print_comparison(config, overrides)


@app.command()
def compare(
    config: ConfigArgument,
    set_: SetOption = None,
    store: RunStoreOption = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw it into this PNG, PDF or SVG too.", show_default=False)
    ] = None,
) -> None:
    """Print what a sweep found: mean and spread over its calibration seeds, the paper's numbers beside them.

    Computes nothing: it shows what the store holds of the sweep, also while it runs.
    """
    _print_comparison(config, _overrides(set_, store), figure)


@app.command()
def plan(config: ConfigArgument, set_: SetOption = None, store: RunStoreOption = None) -> None:
    """Show what is cached, what would run, and why. Changes nothing."""
    from flows.dag import build
    from flows.plan import plan_rows
    from tasks.config import load_config

    settings = load_config(config, _overrides(set_, store))
    rows = plan_rows(build(settings))
    _print_table(["stage", "", "why", "key"], rows)
    cached = sum(row[1] == "cached" for row in rows)
    console.print(f"{cached} of {len(rows)} steps are cached in {Path(settings.store).resolve()}", highlight=False)


@app.command()
def config() -> None:
    """Print a whole configuration: every field, its default and what it means. A start for a file of your own."""
    from tasks.config import default_toml

    print(default_toml(), end="")


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='For example "select * from leaderboard".', show_default=False)],
    store: StoreOption = Path("saap_store"),
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: a header and rows, nothing else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
) -> None:
    """Ask the warehouse, in DuckDB's SQL (read-only).

    Tables: runs, stage_runs, groups, widths, metrics, items, speed, training, published_results. Views: importance (all
    importance tensors), leaderboard, comparison (dense, pruned, recovered side by side), criteria (over calibration
    seeds), criteria_published, ablations, recovery, versus_published, significance (is a difference
    more than noise), seed_spread, stage_reuse.
    """
    import duckdb

    from storage.errors import StorageError
    from storage.warehouse import Warehouse

    try:
        with Warehouse(store).reading() as connection:
            result = connection.execute(query)
            columns = [column[0] for column in result.description or []]
            rows = result.fetchall()
    except duckdb.Error as error:
        raise StorageError(" ".join(str(error).split())[:300]) from error
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    elif as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str, indent=1))
    else:
        _print_table(columns, [[_cell(value) for value in row] for row in rows])


@app.command()
def report(
    run_id: Annotated[str | None, typer.Argument(help="The newest completed run when absent.")] = None,
    store: StoreOption = Path("saap_store"),
    svg: Annotated[Path | None, typer.Option(help="Draw it into this SVG file too.", show_default=False)] = None,
) -> None:
    """Print the result table of a run again."""
    from storage.errors import StorageError
    from storage.warehouse import Warehouse

    with Warehouse(store).reading() as connection:
        found = connection.execute(
            "select run_id, data from runs where coalesce(run_id = ?, status = 'completed') "
            "order by started_at desc limit 1",
            [run_id],
        ).fetchone()
    if found is None:
        raise StorageError(f"no such run in {store.resolve()}: saap sql 'select run_id, name, status from runs'")
    console.record = svg is not None
    _print_run(store, *found)
    if svg is not None:
        console.save_svg(str(svg), title="saap report")


@app.command()
def rebuild(store: StoreOption = Path("saap_store")) -> None:
    """Make the warehouse again from the artifacts and run records of the store."""
    from storage.artifacts import ArtifactStore
    from storage.warehouse import Warehouse

    ArtifactStore(store).prepare()
    console.print(f"warehouse rebuilt from {Warehouse(store).rebuild()} runs")


@app.command()
def verify(store: StoreOption = Path("saap_store")) -> None:
    """Read every artifact of the store and compare it with its digests; set aside what is damaged."""
    from storage.artifacts import ArtifactStore

    artifacts = ArtifactStore(store)
    checked = list(artifacts.all())
    damaged = []
    for stage, key in checked:
        fault = artifacts.inspect(stage, key, verify=True)[1]
        if fault is not None:
            artifacts.find(stage, key, verify=True)
            damaged.append((f"{stage}/{key}", fault))
    if damaged:
        _print_table(["set aside", "because"], damaged)
    console.print(f"{len(checked) - len(damaged)} of {len(checked)} artifacts are whole")
    if damaged:
        raise typer.Exit(1)


@app.command()
def doctor(store: StoreOption = Path("saap_store")) -> None:
    """Check versions, devices, disk and hub, and say what is missing and how to get it."""
    from flows.doctor import examine

    findings = examine(store)
    _print_table(["", "", ""], [(what, "ok" if fine else "MISSING", found) for what, fine, found in findings])
    if not all(fine for _, fine, _ in findings):
        raise typer.Exit(1)


def _check_family(settings: RunConfig) -> None:
    """What would end the run at a late stage."""
    from importlib.util import find_spec

    from saap.models.checkpoint import load_config
    from saap.models.families import family_of
    from storage.keys import Fingerprints
    from tasks.sources import model_source

    source = model_source(settings.model.path, settings.model.revision, Fingerprints(Path(settings.store)))
    if settings.speed.llama_cpp and find_spec("xllamacpp") is None:
        raise ConfigError("speed.llama_cpp needs llama.cpp: pip install -c constraints.txt xllamacpp")
    if source.kind == "folder":
        model_config = load_config(source.path)
        if settings.speed.llama_cpp:
            from saap.export.gguf import check_config

            check_config(model_config)
        if not family_of(model_config).int4 and settings.recover.recipe == "groupwise":
            raise ConfigError(
                f"{model_config.model_type} has no int4 recovery: set recover.recipe to 'lora', 'qlora' or 'none'"
            )


def _start(store: str) -> None:
    """Before the first import of Prefect."""
    from flows.server import quiet_settings
    from storage.artifacts import ArtifactStore

    ArtifactStore(store).prepare()
    quiet_settings(Path(store).resolve())


def _prefect(store: Path) -> Any:
    from flows.server import prefect_api
    from flows.tracebacks import hide_user_tracebacks

    hide_user_tracebacks()
    return prefect_api(store.resolve())


def _print_run(store: Path, run_id: str, data: str) -> None:
    from flows.report import result_rows, skipped_rows, stage_rows

    columns, rows = result_rows(store, run_id)
    _print_table(columns, rows, title=f"run {run_id}")
    for benchmark, why in skipped_rows(store, run_id):
        console.print(f"skipped {benchmark}: {why}", style="yellow", highlight=False, soft_wrap=True)
    stages = stage_rows(store, run_id)
    spent = ", ".join(
        f"{stage} {seconds:.0f} s"
        if cached == 0
        else f"{stage} cached"
        if cached == steps
        else f"{stage} {seconds:.0f} s ({cached} of {steps} cached)"
        for stage, steps, cached, seconds in stages
    )
    console.print(f"stages: {spent}", highlight=False)
    console.print(
        "accuracies in %, the papers' metric of each task; perplexities (↓) at 128 tokens", style="dim", highlight=False
    )
    if data == "mini":
        console.print(
            "The mini pack is for seeing the pipeline work: 36 items a benchmark, standard errors near 8 points. "
            "Its scores compare with no published number; use data = 'hub' or a folder for those.",
            style="yellow",
            highlight=False,
        )
    root = store.resolve()
    console.print(f"files: {root}   warehouse: {root / 'warehouse.duckdb'}", highlight=False, soft_wrap=True)


def _print_comparison(config: Path, overrides: tuple[str, ...], figure: Path | None = None) -> None:
    from flows.compare import compare, table

    found = compare(str(config), overrides)
    _print_table(*table(found), title=config.stem)
    console.print(
        "perplexities (↓) at 128 tokens, accuracies in %, mean ± standard deviation over the seeds of the calibration",
        style="dim",
        highlight=False,
    )
    if found.missing:
        console.print(f"{found.missing} of {found.runs} runs are not complete: saap sweep {config}", highlight=False)
    if figure is not None:
        from flows.figure import draw

        draw(found, figure)
        console.print(f"drawn: {figure.resolve()}", highlight=False, soft_wrap=True)


def _print_table(columns: list[str], rows: Any, title: str | None = None) -> None:
    table = Table(*columns, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Entry point: errors that carry an exit code are for the user and end in one line."""
    code: Any = 0
    try:
        app()
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        print("saap: interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"saap: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # Prefect's threads would outlive the clean-up, and DuckDB complain of it


if __name__ == "__main__":
    main()
