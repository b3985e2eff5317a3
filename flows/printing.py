"""What commands print: tables, and the closing lines of a run."""

import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flows.job import Job

WIDTH = 100  # columns that tables are made to fit
# a pipe or a file has no width of its own: print_table lets nothing be cut there
console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)
_NUMBER = re.compile(r"(-?[\d.,]+(e[+-]\d+)?( ?[M×%]| MB)?|–)?")


def print_run(store: Path, run_id: str, data: str, page: Path | None) -> None:
    """The closing lines of a run: results, seconds a stage, where its files and its page lie."""
    from flows.report import only_other_windows, result_rows, skipped_rows, stage_rows
    from storage.warehouse import Warehouse

    with Warehouse(store).reading() as connection:
        columns, rows = result_rows(connection, run_id)
        skipped, stages = skipped_rows(connection, run_id), stage_rows(connection, run_id)
        elsewhere = only_other_windows(connection, run_id)
    print_table(columns, rows, title=f"run {run_id}")
    for benchmark, why in skipped:
        console.print(f"skipped {benchmark}: {why}", style="yellow", highlight=False, soft_wrap=True)
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
    if elsewhere:
        _say_where_other_windows_are(store, f" where run_id = '{run_id}'")
    _say_what_data_is_for(data)
    for what, where in (("files", store), ("page", page)):
        if where is not None:
            console.print(f"{what}: {where.resolve()}", highlight=False, soft_wrap=True)


def _say_where_other_windows_are(store: Path, which: str = "") -> None:
    from storage.hints import in_store

    console.print(
        f"windows of 128 tokens were not measured; other perplexities: saap sql {in_store(store)} "
        f'"select * from comparison{which}"',
        highlight=False,
        soft_wrap=True,
    )


def _say_what_data_is_for(data: str) -> None:
    if data == "mini":
        console.print(
            "The mini pack is for seeing the pipeline work: 36 items a benchmark at most, standard errors of 8 points. "
            "Its scores compare with no published number; use data = 'hub' or a folder for those.",
            style="yellow",
            highlight=False,
        )


def print_comparison(
    config: Path,
    overrides: tuple[str, ...],
    figure: Path | None = None,
    html: Path | None = None,
    jobs: "Sequence[Job]" = (),
    page: Path | None = None,
) -> None:
    """The table of a sweep and what to see in it, its picture and its page where they are asked for.

    jobs: its runs, where they are known. page: a page that is there already.
    """
    from flows.combinations import base_of
    from flows.compare import compare, headlines, table
    from tasks.config import PERPLEXITIES
    from tasks.stages.evaluate import PAPERS_WINDOW

    found = compare(str(config), overrides, jobs)
    print_table(*table(found), title=config.stem, keep=len(found.axes) + 2)
    spread = ", mean ± standard deviation over the seeds of the calibration" if found.several else ""
    console.print(f"perplexities (↓) at 128 tokens, accuracies in %{spread}", style="dim", highlight=False)
    for line in headlines(found):
        console.print(line, highlight=False)
    base = base_of(config, overrides)
    if set(base.evaluate.benchmarks) & set(PERPLEXITIES) and PAPERS_WINDOW not in base.evaluate.windows:
        _say_where_other_windows_are(Path(base.store))
    _say_what_data_is_for(base.data)
    if found.missing:
        again = shlex.join(["saap", "sweep", str(config), *(f"--set={override}" for override in overrides)])
        console.print(f"{found.missing} of {found.runs} runs are not complete: {again}", highlight=False)
    if figure is not None:
        from flows.figure import draw

        draw(found, figure)
        console.print(f"drawn: {figure.resolve()}", highlight=False, soft_wrap=True)
    if html is not None:
        from flows.targets import write_sweep_of_file

        page = write_sweep_of_file(config, overrides, html)
    if page is not None:
        console.print(f"page: {page.resolve()}", highlight=False, soft_wrap=True)


def print_table(columns: list[str], rows: Any, title: str | None = None, keep: int = 1) -> None:
    """A table without frames. One that is too wide is printed in parts below each other, each with the first columns.

    keep: how many those are. In a terminal too narrow for a part the longest cells are cut, never wrapped.
    """
    texts = [[str(value) for value in row] for row in rows]
    room = max(WIDTH, console.width) if sys.stdout.isatty() else WIDTH
    for number, places in enumerate(_parts(columns, texts, room, keep)):
        if number:
            console.print()
        part = [[row[place] for place in places] for row in texts]
        _print_part([columns[place] for place in places], part, None if number else title)


def _parts(columns: list[str], texts: list[list[str]], room: int, keep: int) -> list[list[int]]:
    """Which columns each part has: as few parts as can be, about equally wide; one if a column fits in none."""
    widths = [_needed([column], [[row[place]] for row in texts]) for place, column in enumerate(columns)]
    least = sum(widths[:keep]) + max(widths[keep:], default=0)

    def filled(room: int) -> list[list[int]]:
        parts = [[*range(keep)]]
        for place in range(keep, len(columns)):
            if sum(widths[one] for one in parts[-1]) + widths[place] > room:
                parts.append([*range(keep)])
            parts[-1].append(place)
        return parts

    if least > room:
        return [[*range(len(columns))]]
    number = len(filled(room))
    while room > least and len(filled(room - 1)) == number:
        room -= 1
    return filled(room)


def _print_part(columns: list[str], texts: list[list[str]], title: str | None) -> None:
    gap = 2 if _needed(columns, texts, gap=2) <= WIDTH else 1
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, gap, 0, 0))
    for place, column in enumerate(columns):
        number = all(_NUMBER.fullmatch(row[place]) for row in texts)
        table.add_column(column, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    for row in texts:
        table.add_row(*row)
    width = console.width
    if not sys.stdout.isatty():
        console.width = max(width, _needed(columns, texts, gap) + len(columns))
    console.print(table)
    console.width = width


def print_answer(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """The answer of a query for people: rounded, and made to fit by saying once what is the same in all rows."""
    texts = [[cell(value) for value in row] for row in rows]
    names = list(columns)
    if _needed(names, texts) > WIDTH:
        texts = [[_shorter(*pair) for pair in zip(columns, row, strict=True)] for row in rows]
    if len(texts) > 1 and _needed(names, texts) > WIDTH:
        same = [place for place in range(len(names)) if len({row[place] for row in texts}) == 1]
        console.print(", ".join(f"{names[place]} {texts[0][place] or '–'}" for place in same), highlight=False)
        names, *texts = ([row[place] for place in range(len(row)) if place not in same] for row in (names, *texts))
    if _needed(names, texts) > WIDTH:
        names = [name.replace("_", "_\n") for name in names]
    print_table(names, texts)


def _needed(names: list[str], texts: list[list[str]], gap: int = 1) -> int:
    """Characters across that a table takes."""
    heads = [max(map(len, name.split("\n"))) for name in names]
    widths = [max([head, *(len(row[place]) for row in texts)]) for place, head in enumerate(heads)]
    return sum(widths) + gap * len(names)


def _shorter(name: str, value: Any) -> str:
    """Run ids by their end, which is enough to name them; times by their day; folders by the last part; sizes in M."""
    text = cell(value)
    if name == "run_id":
        return text.rpartition("-")[2]
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d}"
    if isinstance(value, int) and (name.startswith("parameters") or name.endswith("_bytes")):
        return f"{value / 1e6:,.1f} M"
    return text.rpartition("/")[2] or text if text.startswith("/") else text


def cell(value: Any) -> str:
    """A value for people; --csv and --json have all its digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else str(value)


def rounded(value: float | None) -> str:
    """Three or four digits that matter: 61.6, 844, 12,300, 1.20e+09."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.2e}"
    if abs(value) < 1:
        return f"{value:.4g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
