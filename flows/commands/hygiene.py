"""Commands that keep a store small: gc, du."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.store import StoreOption, there
from flows.printing import console, print_table
from flows.targets import complete_run, pick


def gc(
    store: StoreOption = Path("saap_store"),
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Let this run go too: its id, or how that begins or ends. May be repeated.",
            autocompletion=complete_run,
        ),
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="Let all runs of this name go too. May be repeated.")] = None,
    older: Annotated[float | None, typer.Option(min=0, help="Let runs go too that began more days ago.")] = None,
    remote: Annotated[
        str | None,
        typer.Option(help="Let artifacts go that are whole in this remote store, a URL. Nothing there is touched."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it. Without this nothing is changed.")] = False,
) -> None:
    """Show what nobody needs, or remove it with --delete.

    That is: drafts and work folders of dead runs, damaged and temporary files, locks nobody holds, and artifacts that
    no run refers to. Every run is kept but those that --run, --name or --older pick; their artifacts go unless a kept
    run has them too. What a living run uses is never touched.

    With --remote the store is a cache: artifacts beyond 4 MiB that are whole there go too. Runs with store_remote, and
    saap pull, fetch them again.
    """
    from storage.artifacts import ArtifactStore
    from storage.gc import find_waste, remove, select_runs
    from storage.hints import how_to_list
    from storage.runs import all_runs

    there(store)
    artifacts = ArtifactStore(store)
    known = all_runs(artifacts.root)
    picked = [pick(known, one, str(artifacts.root), how_to_list(artifacts.root)) for one in run or ()]
    dropped = select_runs(artifacts.root, ids=picked, names=name or (), older_than_days=older)
    elsewhere: set[tuple[str, str]] = set()
    if remote is not None:
        from storage.remote import remote_of

        elsewhere = remote_of(remote).spares(artifacts)
    waste = find_waste(artifacts, dropped, elsewhere)
    locks = [one for one in waste if one.kind == "lock"]
    rows = [
        (one.kind, str(one.path.relative_to(artifacts.root)), amount(one.bytes), one.why)
        for one in waste
        if one.kind != "lock"
    ]
    if locks:
        rows.append((f"{len(locks)} locks", "locks", amount(sum(one.bytes for one in locks)), locks[0].why))
    if rows:
        print_table(["what", "where", "size", "why"], rows)
    if delete:
        console.print(f"removed: {amount(remove(artifacts, waste))}", highlight=False)
    else:
        total = amount(sum(one.bytes for one in waste))
        console.print(f"{total} can go. Nothing was changed: --delete removes it", highlight=False)


def du(store: StoreOption = Path("saap_store")) -> None:
    """Show what takes the space in the store, by stage and by run."""
    from storage.artifacts import ArtifactStore
    from storage.gc import by_run, by_stage

    there(store)
    artifacts = ArtifactStore(store)
    stages = by_stage(artifacts)
    print_table(["stage", "number", "size"], [(stage, number, amount(b)) for stage, number, b in stages])
    rows = [(run, name, amount(total), amount(alone)) for run, name, total, alone in by_run(artifacts)]
    if rows:
        print_table(["run", "name", "uses", "alone"], rows)
    console.print(f"{amount(sum(row[2] for row in stages))} in {artifacts.root}", highlight=False, soft_wrap=True)


def amount(bytes_: int) -> str:
    """1,234,567 → '1.2 MB'."""
    value, unit = float(bytes_), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
