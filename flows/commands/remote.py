"""Commands that copy runs between the store and a remote one: push, pull."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.store import StoreOption, there
from flows.printing import console, print_table
from flows.targets import complete_run, find_run, pick

RemoteOption = Annotated[
    str, typer.Option("--remote", help="The remote store: a URL like s3://bucket/prefix, or a folder.")
]


def push(
    remote: RemoteOption,
    run: Annotated[
        str | None,
        typer.Argument(
            help="Run id or its beginning or end; the newest completed run when absent.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    store: StoreOption = Path("saap_store"),
) -> None:
    """Copy a run to a remote store: those of its artifacts that are not there, then its record.

    Runs with store_remote in their configuration do that themselves. Nothing there is removed or replaced.
    """
    from storage.artifacts import ArtifactStore
    from storage.errors import StorageError
    from storage.remote import remote_of
    from storage.runs import is_alive
    from storage.warehouse import Warehouse

    there(store)
    with Warehouse(store).reading() as connection:
        run_id = find_run(connection, store, run)
    artifacts, target = ArtifactStore(store), remote_of(remote)
    if is_alive(artifacts.root, run_id):
        raise StorageError(f"run {run_id} is at work: push it when it has ended")
    target.files.check(store, write=True)
    _say(target.push(artifacts, run_id), f"run {run_id} is in {remote}")


def pull(
    remote: RemoteOption,
    run: Annotated[
        str | None, typer.Argument(help="Run id or its beginning or end; lists them when absent.", show_default=False)
    ] = None,
    store: StoreOption = Path("saap_store"),
) -> None:
    """Fetch a run from a remote store, its artifacts and its record, or list the runs there.

    Then sql, report, show, diff and the exports know it like a run of this store.
    """
    from storage.artifacts import ArtifactStore
    from storage.remote import remote_of

    source = remote_of(remote)
    source.files.check(store, write=False)
    if run is None:
        records = [record["run"] for record in source.records()]
        columns = ["run_id", "name", "model", "criterion", "ratio", "status"]
        print_table(columns, [[str(record[column]) for column in columns] for record in records])
        return
    artifacts = ArtifactStore(store)
    picked = pick(source.all_runs(), run, remote, f"saap pull --remote {remote} lists them")
    artifacts.prepare()
    _say(source.pull(artifacts, picked), f"run {picked} is in {artifacts.root}")


def _say(lost: list[str], done: str) -> None:
    if lost:
        print_table(["nobody has", "any more"], [one.split("/") for one in lost])
    console.print(done, highlight=False, soft_wrap=True)
