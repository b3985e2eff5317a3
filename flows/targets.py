"""What people name on the command line: a run by its id or a part of it, a sweep by its file or its name."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.combinations import base_of, combinations
from storage.errors import StorageError
from storage.hints import how_to_list
from storage.runs import all_runs
from storage.warehouse import Warehouse
from tasks.compute import MEMORY
from tasks.config import load_config

_ELSEWHERE = ("store", "store_remote", "compute", "execute")


def find_run(connection: Any, store: Path, named: str | None) -> str:
    """The id of the one run whose id begins or ends like this; of the newest completed run without a name.

    Raises StorageError when there is none, or more than one.
    """
    if named is None:
        query = "select run_id from runs where status = 'completed' order by started_at desc, run_id desc limit 1"
        found = connection.execute(query).fetchall()
        if not found:
            raise StorageError(f"no completed run in {store.resolve()}: {how_to_list(store.resolve())}")
        return str(found[0][0])
    return pick(matching_runs(connection, named), named, str(store.resolve()), how_to_list(store.resolve()))


def pick(run_ids: list[str], named: str, place: str, listing: str) -> str:
    """The one of these runs whose id is this, or begins or ends like it. Raises StorageError for none or several."""
    ids = [one for one in run_ids if named and (one.startswith(named) or one.endswith(named))]
    ids = [named] if named in ids else ids
    if not ids:
        raise StorageError(f"no such run in {place}: '{named}'; {listing}")
    if len(ids) > 1:
        raise StorageError(f"'{named}' is {len(ids)} runs: {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}")
    return ids[0]


def matching_runs(connection: Any, named: str) -> list[str]:
    """The run of this id, or those whose ids begin or end like it."""
    query = "select run_id from runs where run_id = $1 or starts_with(run_id, $1) or ends_with(run_id, $1) order by 1"
    ids = [str(row[0]) for row in connection.execute(query, [named]).fetchall()] if named else []
    return [named] if named in ids else ids


def complete_run(incomplete: str) -> list[str]:
    """For the shell: ids of the runs in the store of SAAP_STORE or of this folder, newest first."""
    ids = all_runs(Path(os.environ.get("SAAP_STORE", "saap_store")))
    return [run_id for run_id in reversed(ids) if run_id.startswith(incomplete)]


@dataclass(frozen=True)
class Sweep:
    """missing: how many of its runs have not been made; named: the words that name it on the command line."""

    title: str
    run_ids: list[str]
    missing: int
    named: tuple[str, ...]


def store_of(config: Path, overrides: tuple[str, ...]) -> Path:
    """The store that a sweep's file names."""
    return Path(base_of(config, overrides).store)


def sweep_page(store: str | Path, config: str | Path) -> Path:
    """Where `saap sweep` writes its page."""
    return Path(store) / f"{Path(config).stem}.html"


def sweep_of_file(connection: Any, config: Path, overrides: tuple[str, ...]) -> Sweep:
    """The newest run of each combination of a sweep's file, a completed one if there is. Raises ConfigError."""
    made: dict[str, str] = {}
    query = "select run_id, config from runs order by status = 'completed', started_at, run_id"
    for run_id, text in connection.execute(query).fetchall():
        made[_settings(json.loads(text))] = run_id
    wanted = [_settings(_config(config, (*chosen, *overrides))) for chosen in combinations(str(config), overrides)]
    found = [made[settings] for settings in wanted if settings in made]
    named = (str(config), *(f"--set={override}" for override in overrides))
    return Sweep(config.stem, found, len(wanted) - len(found), named)


def write_sweep_of_file(config: Path, overrides: tuple[str, ...], html: Path) -> Path:
    """Write the page of a sweep's file; its store is the file's own. Raises ConfigError or StorageError."""
    from flows.pages.render import write
    from flows.pages.write import page_of_sweep

    store = store_of(config, overrides)
    with Warehouse(store).reading() as connection:
        sweep = sweep_of_file(connection, config, overrides)
        text = page_of_sweep(store, connection, sweep)
    return write(html, text)


def sweep_of_name(connection: Any, name: str) -> Sweep | None:
    """All runs of a name; None when there are none."""
    found = connection.execute("select run_id from runs where name = ? order by run_id", [name]).fetchall()
    return Sweep(name, [row[0] for row in found], 0, (name,)) if found else None


def _config(file: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    return load_config(file, overrides).model_dump(mode="json")


def _settings(config: dict[str, Any]) -> str:
    """What tells two runs apart: not the store's place, nor how and where the work is done."""
    told = {name: value for name, value in config.items() if name not in _ELSEWHERE}
    if isinstance(recover := told.get("recover"), dict):
        told["recover"] = {name: value for name, value in recover.items() if name not in MEMORY}
    if isinstance(cut := told.get("prune"), dict) and cut.get("target") is not None:
        told["prune"] = {name: value for name, value in cut.items() if name != "ratio"}  # a run's was found
    return json.dumps(told, sort_keys=True)
