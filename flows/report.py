"""What a run found, as rows for a table."""

from duckdb import DuckDBPyConnection

from tasks.config import ACCURACIES, PERPLEXITIES

SHORT = {
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "boolq": "BoolQ",
    "hellaswag": "HellaS",
    "piqa": "PIQA",
    "winogrande": "WinoG",
    "openbookqa": "OBQA",
    "wikitext2": "Wiki2↓",
    "ptb": "PTB↓",
}


def result_rows(connection: DuckDBPyConnection, run_id: str) -> tuple[list[str], list[list[str]]]:
    """One row a variant: the nine benchmarks, the average of the seven accuracies, parameters, memory, tokens/s.

    Of models with experts also the parameters that one token passes ("active"). Accuracies in percent, the papers'
    metric of each; the average only when all seven are there.
    """
    metrics = connection.execute(
        "select variant, benchmark, value, papers from metrics where run_id = ?", [run_id]
    ).fetchall()
    speed = connection.execute(
        "select variant, parameters, active_parameters, weight_bytes, tokens_per_s, decode_ratio from speed "
        "where run_id = ?",
        [run_id],
    ).fetchall()
    values = {(variant, benchmark): value for variant, benchmark, value, papers in metrics if papers}
    speeds = {row[0]: row[1:] for row in speed}
    sparse = any(active not in (None, parameters) for parameters, active, *_ in speeds.values())
    present = {variant for variant, *_ in metrics} | set(speeds)
    rows = []
    for variant in [v for v in ("dense", "pruned", "recovered") if v in present]:
        accuracies = [values.get((variant, benchmark)) for benchmark in ACCURACIES]
        known = [a for a in accuracies if a is not None]
        row = [variant, *(_percent(a) for a in accuracies)]
        row.append(_percent(sum(known) / len(known)) if len(known) == len(ACCURACIES) else "–")
        row += [_perplexity(values.get((variant, benchmark))) for benchmark in PERPLEXITIES]
        if variant in speeds:
            parameters, active, weight_bytes, rate, ratio = speeds[variant]
            row += [f"{parameters / 1e6:.1f}M", *([f"{active / 1e6:.1f}M"] if sparse else [])]
            row += [f"{weight_bytes / 1e6:.0f} MB", f"{rate:.1f}", f"{ratio:.2f}×"]
        else:
            row += ["–"] * (4 + sparse)
        rows.append(row)
    columns = ["variant", *(SHORT[b] for b in ACCURACIES), "avg", *(SHORT[b] for b in PERPLEXITIES)]
    return [*columns, "params", *(["active"] if sparse else []), "weights", "tok/s", "speed"], rows


def only_other_windows(connection: DuckDBPyConnection, run_id: str) -> bool:
    """Whether perplexities were measured, but not in windows of 128 tokens, the papers', which tables show."""
    query = "select count(*) > 0 and not bool_or(papers) from metrics where run_id = ? and metric = 'perplexity'"
    ((found,),) = connection.execute(query, [run_id]).fetchall()
    return bool(found)


def stage_rows(connection: DuckDBPyConnection, run_id: str) -> list[tuple[str, int, int, float]]:
    """(stage, steps, of which cached, seconds computing in this run) in the order of the run."""
    return connection.execute(
        "select stage, count(*), count(*) filter (cached), coalesce(sum(seconds) filter (not cached), 0) "
        "from stage_runs where run_id = ? and skipped is null group by stage order by min(position)",
        [run_id],
    ).fetchall()


def skipped_rows(connection: DuckDBPyConnection, run_id: str) -> list[tuple[str, str]]:
    """(benchmark, why and what helps) of the benchmarks that were not run because their data is missing."""
    return connection.execute(
        "select benchmark, skipped from stage_runs where run_id = ? and skipped is not null "
        "group by all order by min(position)",
        [run_id],
    ).fetchall()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 10000 else f"{value:.2e}"
