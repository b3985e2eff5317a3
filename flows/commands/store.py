"""Commands that look at a store: sql, rebuild, verify, doctor."""

import csv
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.printing import console, print_answer, print_table

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="SAAP_STORE", help="Folder with the artifacts and the warehouse.")
]


def sql(
    query: Annotated[str, typer.Argument(help='For example "select * from leaderboard".', show_default=False)],
    store: StoreOption = Path("saap_store"),
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: a header and rows, nothing else.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows; NaN becomes null.")] = False,
) -> None:
    """Ask the warehouse, in DuckDB's SQL. It reads the store's tables and nothing else, and writes nothing.

    Tables: runs, stage_runs, groups, widths, metrics, items, speed, training, published_results. Views: importance (all
    importance tensors), leaderboard (a row a different result), results (a row a run and variant), comparison (dense,
    pruned, recovered side by side), criteria (over calibration seeds), criteria_published, ablations, recovery,
    versus_published, significance (is a difference more than noise), seed_spread, stage_reuse.
    """
    from storage.errors import StorageError
    from storage.query import as_json, ask

    if as_csv and json_:
        raise StorageError("--csv and --json are two forms of the same rows: choose one")
    columns, rows = ask(store, query)
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    elif json_:
        print(json.dumps(as_json(columns, rows), allow_nan=False, indent=1))
    else:
        print_answer(columns, rows)


def rebuild(store: StoreOption = Path("saap_store")) -> None:
    """Make the warehouse again from the artifacts and run records of the store."""
    from storage.warehouse import Warehouse

    there(store)
    console.print(f"warehouse rebuilt from {Warehouse(store).rebuild()} runs")


def verify(store: StoreOption = Path("saap_store")) -> None:
    """Read every artifact of the store and compare it with its digests; set aside what is damaged."""
    from storage.artifacts import ArtifactStore

    there(store)
    artifacts = ArtifactStore(store)
    checked = list(artifacts.all())
    damaged = []
    for stage, key in checked:
        fault = artifacts.inspect(stage, key, verify=True)[1]
        if fault is not None:
            artifacts.find(stage, key, verify=True)
            damaged.append((f"{stage}/{key}", fault))
    if damaged:
        print_table(["set aside", "because"], damaged)
    console.print(f"{len(checked) - len(damaged)} of {len(checked)} artifacts are whole")
    if damaged:
        raise typer.Exit(1)


def doctor(store: StoreOption = Path("saap_store")) -> None:
    """Check versions, devices, disk and hub, and say what is missing and how to get it."""
    from flows.doctor import examine

    findings = examine(store)
    print_table(["", "", ""], [(what, "ok" if fine else "MISSING", found) for what, fine, found in findings])
    if not all(fine for _, fine, _ in findings):
        raise typer.Exit(1)


def there(store: Path) -> None:
    """A mistyped path must not become a store."""
    from storage.errors import StorageError

    if not any((store / part).is_dir() for part in ("runs", "locks", "damaged")):
        raise StorageError(f"no store in {store.resolve()}: run something first (saap run …), or name another --store")
