"""Write the page of a run or a sweep."""

import datetime
import json
import shlex
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from flows.pages import run_head, run_page, sweep_page
from flows.pages.render import page, write
from flows.pages.section import Section, ask
from flows.targets import Sweep
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.hints import how_to_list
from storage.warehouse import Warehouse

RESULTS = """
select * from results where run_id = ?
order by list_position(['dense', 'pruned', 'recovered'], variant)"""


def report_file(store: Path, run_id: str) -> Path:
    """Where the page of a run lies."""
    return store.resolve() / "runs" / run_id / "report.html"


def write_report(store: Path, run_id: str, file: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return its path: beside the run's record unless told otherwise.

    Raises StorageError when there is no such run, or the file cannot be written.
    """
    warehouse = Warehouse(store)
    with warehouse.reading() as connection:
        text = page_of_run(warehouse, connection, run_id)
    return write(file or report_file(store, run_id), text)


def page_of_run(warehouse: Warehouse, connection: Any, run_id: str) -> str:
    """The page of a run, for those who have a connection. Raises StorageError when there is no such run."""
    found = ask(connection, "select * from runs where run_id = ?", run_id)
    if not found:
        raise StorageError(f"no run {run_id} in {warehouse.root}: {how_to_list(warehouse.root)}")
    scored = ask(connection, "select key from stage_runs where run_id = ? and stage = 'score'", run_id)
    warehouse.show_importance(connection, {row["key"] for row in scored})
    (run,), artifacts = found, ArtifactStore(warehouse.root)
    config = json.loads(run["config"])
    stages = {row["stage"] for row in ask(connection, "select stage from stage_runs where run_id = ?", run_id)}
    absent = partial(run_head.absent, run, config, stages)
    results = ask(connection, RESULTS, run_id)
    kept = run_page.kept(connection, run_id, absent)
    direction = config.get("prune", {}).get("direction", "lowest")
    sections: list[Section] = [
        run_page.scores(connection, run_id, absent),
        run_page.sizes(connection, run_id, absent),
        kept,
        run_page.importance(connection, run_id, absent, direction),
        run_page.losses(connection, run_id, absent),
        run_page.steps(connection, run_id, absent),
        run_head.changed(config),
        run_head.versions(artifacts, connection, run_id),
    ]
    return page(
        warehouse.root,
        f"{run['name']}: {run['model']}",
        sections,
        kind="run",
        run=run,
        facts=_facts(run),
        sentences=run_head.sentences(run, config, kept.rows, results),
        tiles=run_head.tiles(results),
        checkpoints=run_head.checkpoints(artifacts, connection, run_id),
        reference=run_id,
    )


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    started = f"{run['started_at']:%Y-%m-%d %H:%M} UTC"
    took = run["finished_at"] and run["finished_at"] - run["started_at"]
    facts = [("run", run["run_id"]), ("status", run["status"]), ("started", started)]
    if took is not None:
        facts.append(("took", str(datetime.timedelta(seconds=round(took.total_seconds())))))
    return [*facts, *([("error", run["error"])] if run["error"] else [])]


def write_sweep(store: Path, title: str, run_ids: list[str], file: Path, missing: int = 0) -> Path:
    """Write the page of the runs of a name. missing: how many more belong to them but have not been made.

    Raises StorageError when the file cannot be written.
    """
    with Warehouse(store).reading() as connection:
        text = page_of_sweep(store, connection, Sweep(title, run_ids, missing, (title,)))
    return write(file, text)


def page_of_sweep(store: Path, connection: Any, sweep: Sweep) -> str:
    """The page of several runs of a store, for those who have a connection."""
    run_ids, missing = sweep.run_ids, sweep.missing
    rows = sweep_page.rows_of(connection, run_ids)
    published = sweep_page.ghosts(connection, run_ids, rows)
    labels = list(dict.fromkeys(row["setting"] for row in sorted(rows, key=lambda row: row["variant"] != "dense")))
    sections = [
        sweep_page.settings(rows, labels, {row["benchmark"] for row in published.rows} if published else ()),
        *([published] if published else []),
        sweep_page.reuse(connection, run_ids),
        sweep_page.runs(connection, run_ids, missing),
    ]
    models = list(dict.fromkeys(row["model"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows} - {0})
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    settings = {row["setting"] for row in rows if row["variant"] != "dense"}
    said = f"{len(run_ids)} runs: {_count(models, 'model')}, {_count(ratios, 'ratio')}, {_count(settings, 'setting')}."
    return page(
        store,
        sweep.title,
        sections,
        kind="sweep",
        facts=[("runs", str(len(run_ids))), ("not made yet", str(missing))],
        sentences=[said],
        tiles=[],
        checkpoints=[],
        filters=[("model", "models", models), ("ratio", "ratios", ratios), ("variant", "variants", variants)],
        reference=shlex.join(sweep.named),
    )


def _count(values: Collection[Any], what: str) -> str:
    return f"{len(values)} {what}{'' if len(values) == 1 else 's'}"
