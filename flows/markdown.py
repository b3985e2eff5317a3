"""A run and a sweep as Markdown, for Prefect's UI."""

from collections.abc import Sequence
from pathlib import Path

from duckdb import DuckDBPyConnection

from flows.compare import compare, table
from flows.job import Job
from flows.pages.run_head import checkpoints
from flows.pages.section import ask
from flows.pages.write import report_file
from flows.report import result_rows
from storage.artifacts import ArtifactStore

BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTHS = "select kind, kept, units from widths where run_id = ? order by kind, layer"


def run_markdown(store: Path, connection: DuckDBPyConnection, run_id: str) -> str:
    """Results, what stays layer by layer, and where the checkpoints and the page lie."""
    parts = [f"# Run {run_id}", _table(*result_rows(connection, run_id))]
    rows = ask(connection, _WIDTHS, run_id)
    folders = checkpoints(ArtifactStore(store), connection, run_id)
    if rows:
        kinds = dict.fromkeys(row["kind"] for row in rows)
        shares = {kind: [row["kept"] / row["units"] for row in rows if row["kind"] == kind] for kind in kinds}
        lines = [f"{kind:<10}{''.join(_block(share) for share in of)}" for kind, of in shares.items()]
        parts += ["## What stays, layer by layer", "```\n" + "\n".join(lines) + "\n```"]
    places = [f"- {variant}: `{folder}`" for variant, folder in folders]
    parts += ["## Files", "\n".join([*places, f"- page: `{report_file(store, run_id)}`"])]
    return "\n\n".join(parts)


def sweep_markdown(config: str, overrides: tuple[str, ...], jobs: Sequence[Job], page: Path) -> str:
    """The comparison of a sweep's runs, and where their page is."""
    found = compare(config, overrides, jobs)
    missing = f"\n\n{found.missing} of {found.runs} runs are not complete." if found.missing else ""
    return f"# {Path(config).stem}\n\n{_table(*table(found))}{missing}\n\npage: `{page}`"


def _block(share: float) -> str:
    """A full block is a layer left whole, a space one of which nothing is left."""
    most = len(BLOCKS) - 1
    return BLOCKS[most if share == 1 else min(most - 1, max(int(share > 0), round(share * most)))]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
