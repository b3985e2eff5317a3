"""What commands print: tables, and the closing lines of a run."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# a pipe or a file has no width of its own: let nothing be cut there
console = Console(width=None if sys.stdout.isatty() else 200, markup=False)


def print_run(store: Path, run_id: str, data: str) -> None:
    from flows.report import result_rows, skipped_rows, stage_rows

    columns, rows = result_rows(store, run_id)
    print_table(columns, rows, title=f"run {run_id}")
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


def print_comparison(config: Path, overrides: tuple[str, ...], figure: Path | None = None) -> None:
    from flows.compare import compare, table

    found = compare(str(config), overrides)
    print_table(*table(found), title=config.stem)
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


def print_table(columns: list[str], rows: Any, title: str | None = None) -> None:
    table = Table(*columns, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row))
    console.print(table)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
