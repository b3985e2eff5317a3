"""The runs of a sweep side by side: means and spreads over its calibration seeds, the paper's numbers beside them.

A run is found by the keys of its steps. So runs of other code, data or settings are left out, and gaps show.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from flows.combinations import combinations
from flows.dag import build
from flows.job import Job
from flows.report import SHORT
from flows.to_ratio import NotTimed, with_ratio
from storage.artifacts import ArtifactStore
from storage.warehouse import Warehouse
from tasks.config import ACCURACIES, PERPLEXITIES, RunConfig, load_config
from tasks.outside import SharedOutside
from tasks.step import Step
from tasks.toml import parse_value

MEASURES = (*PERPLEXITIES, *ACCURACIES, "average", "parameters", "weight_bytes", "tokens_per_s")
TIMED = "speed"
PAPER_MODEL = "llama-7b"
_OF_DENSE = ("model.", "data", "evaluate.", "speed.")  # axes that the dense model's numbers depend on


@dataclass
class Row:
    """One setting of the axes and one variant: means over the calibration seeds; accuracies in percent."""

    chosen: tuple[str, ...]
    ratio: float
    variant: str
    target: str = ""  # what the ratio was found for
    runs: int = 0
    means: dict[str, float] = field(default_factory=dict)  # by measure
    spreads: dict[str, float] = field(default_factory=dict)  # sample standard deviations, of two seeds or more
    seconds: float | None = None  # to rank
    published: dict[str, float] = field(default_factory=dict)  # measure → the paper's number
    misprint: bool = False

    @property
    def aim(self) -> str:
        """What was asked for: the target, else the ratio."""
        return self.target or f"{self.ratio:g}"

    def mean(self, measure: str) -> float | None:
        return self.means.get(measure)

    def spread(self, measure: str) -> float | None:
        return self.spreads.get(measure)


@dataclass
class Comparison:
    """axes: what the sweep varies, except ratio, target and seed. Rows are in the order of the sweep, dense first."""

    axes: list[str]
    rows: list[Row]
    missing: int  # runs that are not complete
    runs: int

    @property
    def several(self) -> bool:
        """Whether a row is of more than one run."""
        return any(row.runs > 1 for row in self.rows)

    @property
    def measures(self) -> list[str]:
        """Those that a row has; a task by itself only where its row has no average of all seven."""
        shown = {m for row in self.rows for m in row.means if m not in ACCURACIES or "average" not in row.means}
        return [m for m in MEASURES if m in shown]


@dataclass(frozen=True)
class _Combination:
    """One run of a sweep: where it stands in the table, and its steps' keys."""

    chosen: tuple[str, ...]
    ratio: float
    target: str
    keys: frozenset[str]
    untimed: frozenset[str]  # the same, of speeds only that there are some: their key is this machine's
    parameters: float | None  # of the pruned model, if it is there


def compare(config: str, overrides: tuple[str, ...] = (), jobs: Sequence[Job] = ()) -> Comparison:
    """What the store holds of a sweep; no number of the paper beside those of the mini pack, which compare with none.

    jobs: its runs, where they are known: then neither models nor data are looked at, nor the hub asked.
    Raises ConfigError for a file without a [sweep] table.
    """
    sweep = [list(job.chosen) for job in jobs] or combinations(config, overrides)
    names = [choice.partition("=")[0] for choice in sweep[0]]
    axes = [name for name in names if name not in ("prune.ratio", "prune.target", "calibrate.seed")]
    settings = [job.settings for job in jobs] or [load_config(config, (*chosen, *overrides)) for chosen in sweep]
    store, outside = Path(settings[0].store), SharedOutside(look_only=True)
    steps: list[list[Step] | None] = [*(job.steps for job in jobs)] or [_steps_of(one, outside) for one in settings]
    wanted = [_combination(*of_one, axes) for of_one in zip(settings, sweep, steps, strict=True)]
    if Warehouse(store).is_empty():
        return Comparison(axes, [], len(sweep), len(sweep))
    with Warehouse(store).reading() as connection:
        runs = _runs_of(connection, wanted)
        rows = _rows(connection, wanted, runs, axes)
    if settings[0].data == "mini":
        for row in rows:
            row.published, row.misprint = {}, False
    return Comparison(axes, rows, len(sweep) - len(runs), len(sweep))


def _steps_of(settings: RunConfig, outside: SharedOutside) -> list[Step] | None:
    """None where a target has no ratio yet."""
    try:
        settings = with_ratio(settings, outside.of(settings), look_only=True)
    except NotTimed:
        return None
    return build(settings, outside=outside.of(settings))


def _combination(settings: RunConfig, chosen: list[str], steps: Sequence[Step] | None, axes: list[str]) -> _Combination:
    values = {path: str(parse_value(text)) for path, _, text in (choice.partition("=") for choice in chosen)}
    place = tuple(values[axis] for axis in axes)
    target = settings.prune.target or ""
    if steps is None:
        return _Combination(place, 0.0, target, frozenset({"no key yet"}), frozenset({"no key yet"}), None)
    cut = next(step for step in steps if step.stage == "prune")
    manifest, _ = ArtifactStore(settings.store).inspect(cut.stage, cut.key)
    parameters = manifest["summary"].get("parameters") if manifest else None
    made = [step for step in steps if step.missing is None]
    keys, untimed = ({step.key for step in made}, {TIMED if step.stage == TIMED else step.key for step in made})
    return _Combination(place, settings.prune.ratio, target, frozenset(keys), frozenset(untimed), parameters)


def _runs_of(connection: duckdb.DuckDBPyConnection, wanted: list[_Combination]) -> dict[int, str]:
    """Number of a combination → the newest completed run of just its steps: one with more is another sweep's.

    Where there is none, one whose speeds were measured elsewhere, unless other combinations differ by that alone.
    """
    made = connection.execute(
        f"select run_id, list(key), list(if(stage = '{TIMED}', stage, key)) from stage_runs join runs using (run_id) "
        "where status = 'completed' and skipped is null group by run_id order by run_id"
    ).fetchall()
    exact = {frozenset(keys): run_id for run_id, keys, _ in made}
    elsewhere = {frozenset(untimed): run_id for run_id, _, untimed in made}
    alike = Counter(one.untimed for one in wanted)
    found = {
        number: exact.get(one.keys) or (elsewhere.get(one.untimed) if alike[one.untimed] == 1 else None)
        for number, one in enumerate(wanted)
    }
    return {number: run_id for number, run_id in found.items() if run_id is not None}


def _rows(
    connection: duckdb.DuckDBPyConnection, wanted: list[_Combination], runs: dict[int, str], axes: list[str]
) -> list[Row]:
    """One row a setting and variant, dense first. The dense model appears once, whatever was pruned from it."""
    rows: dict[tuple[Any, ...], Row] = {}
    places: dict[tuple[tuple[str, ...], float, str], list[int]] = {}
    for number in sorted(runs):
        one = wanted[number]
        places.setdefault((one.chosen, one.ratio, one.target), []).append(number)
    means = _means(connection, [[runs[number] for number in numbers] for numbers in places.values()], axes)
    for ((chosen, ratio, target), numbers), here in zip(places.items(), means, strict=True):
        for row in here:
            row.chosen, row.ratio, row.target = chosen, ratio, target
            if row.variant == "dense":
                told = (value if axis.startswith(_OF_DENSE) else "" for axis, value in zip(axes, chosen, strict=True))
                row.chosen, row.ratio, row.runs = tuple(told), 0.0, 1
                row.spreads, row.seconds, row.target = {}, None, ""
            elif row.variant == "pruned" and "parameters" not in row.means:
                sizes = [size for size in (wanted[number].parameters for number in numbers) if size is not None]
                row.means |= {"parameters": sum(sizes) / len(sizes)} if sizes else {}
            rows.setdefault((row.variant, row.aim, row.chosen), row)
    order = {"dense": 0, "pruned": 1, "recovered": 2}
    return sorted(rows.values(), key=lambda row: (order[row.variant], row.ratio))


def _means(connection: duckdb.DuckDBPyConnection, places: list[list[str]], axes: list[str]) -> list[list[Row]]:
    """For each place in the table, given by its runs, a row a variant: what `criteria` says, of these runs alone."""
    columns = ", ".join(f"avg({m} order by run_id), stddev_samp({m} order by run_id)" for m in MEASURES)
    found = connection.execute(
        "with places as (select unnest(range(len($runs))) as place, unnest($runs) as runs), "
        "mine as (select place, unnest(runs) as run_id from places) "
        f"select place, variant, min(settings), count(*), avg(seconds_to_rank order by run_id), {columns} "
        "from mine join ablations using (run_id) group by place, variant order by all",
        {"runs": places},
    ).fetchall()
    published = _published(connection, list({settings for _, _, settings, *_ in found}), axes)
    rows: list[list[Row]] = [[] for _ in places]
    for place, variant, settings, count, seconds, *numbers in found:
        row = Row((), 0.0, variant, runs=count, seconds=seconds)
        for measure, mean, spread in zip(MEASURES, numbers[::2], numbers[1::2], strict=True):
            scale = 100 if measure in (*ACCURACIES, "average") else 1
            row.means |= {} if mean is None else {measure: mean * scale}
            row.spreads |= {} if spread is None else {measure: spread * scale}
        row.published, row.misprint = published.get((settings, variant), ({}, False))
        rows[place].append(row)
    return rows


def _published(
    connection: duckdb.DuckDBPyConnection, settings: list[str], axes: list[str]
) -> dict[tuple[str, str], tuple[dict[str, float], bool]]:
    """(settings, variant) → the paper's numbers for LLaMA-7B that match it, and whether they are marked misprints."""
    found = connection.execute(
        "select settings, variant, setting, benchmark, published, misprint from criteria_published "
        "where list_contains($settings, settings) and list_contains($axes, setting)",
        {"settings": settings, "axes": [axis_name(axis) for axis in axes]},
    ).fetchall()
    matches: dict[tuple[str, str], list[tuple[str, str, float, bool]]] = {}
    for one, variant, *match in found:
        matches.setdefault((one, variant), []).append(tuple(match))
    return {
        place: ({benchmark: value for _, benchmark, value, _ in its}, any(misprint for *_, misprint in its))
        for place, its in matches.items()
        if len({setting for setting, *_ in its}) == 1
    }


_COLUMNS = {
    **{benchmark: (short, 1.0) for benchmark, short in SHORT.items()},
    "average": ("avg", 1.0),
    "parameters": ("params M", 1e-6),
    "weight_bytes": ("MB", 1e-6),
    "tokens_per_s": ("tok/s", 1.0),
}


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: mean ± spread over the seeds; 'paper' is LLaMA-7B as printed, for the eye only."""
    shown = comparison.measures
    published = any(row.published for row in comparison.rows)
    seeds = ["seeds"] if comparison.several else []
    targets = ["target"] if any(row.target for row in comparison.rows) else []
    columns = [*map(axis_name, comparison.axes), *targets, "ratio", "variant", *seeds, *(_COLUMNS[m][0] for m in shown)]
    rows = []
    for row in comparison.rows:
        cells = [*row.chosen, *[row.target for _ in targets], f"{row.ratio:g}" if row.ratio else "", row.variant]
        cells += [str(row.runs) for _ in seeds]
        cells += [_cell(row.mean(m), row.spread(m), _COLUMNS[m][1]) for m in shown]
        cells.append("" if row.variant == "dense" else _cell(row.seconds))
        if published:
            numbers = ", ".join(f"{_COLUMNS[m][0]} {v * _COLUMNS[m][1]:g}" for m, v in row.published.items())
            cells.append(numbers + (" (misprint)" if row.misprint else ""))
        rows.append(cells)
    return [*columns, "s to rank", *([f"paper, {PAPER_MODEL}"] if published else [])], rows


def headlines(comparison: Comparison) -> list[str]:
    """A line a model, variant and ratio (or target): the setting of lowest perplexity, beside highest and dense."""
    place = comparison.axes.index("model.path") if "model.path" in comparison.axes else None

    def model(row: Row) -> str:
        return "" if place is None else row.chosen[place]

    measured = [row for row in comparison.rows if "wikitext2" in row.means]
    dense = {model(row): row for row in measured if row.variant == "dense"}
    lines = []
    pruned = [row for row in measured if row.variant != "dense"]
    for key in dict.fromkeys((model(row), row.variant, row.aim) for row in pruned):
        rows = [row for row in pruned if (model(row), row.variant, row.aim) == key]
        best, *_, worst = sorted(rows, key=lambda row: row.means["wikitext2"]) if len(rows) > 1 else (rows[0], rows[0])
        if key[0] in dense and best.means["wikitext2"] < worst.means["wikitext2"]:
            lines.append(_headline(comparison.axes, best, worst, dense[key[0]]))
    return lines


def _headline(axes: list[str], best: Row, worst: Row, dense: Row) -> str:
    def named(row: Row) -> str:
        settings = [f"{axis_name(a)} {value}" for a, value in zip(axes, row.chosen, strict=True)]
        return row.chosen[0] if axes == ["criterion.name"] else ", ".join(settings)

    low, high, whole = (_cell(row.means["wikitext2"]) for row in (best, worst, dense))
    line = f"{best.variant} at {best.aim}: {named(best)} is best on WikiText-2, {low}, where {named(worst)} has "
    line += f"{high} and the dense model {whole}"
    sizes, speeds = ([row.means.get(m) for row in (best, dense)] for m in ("weight_bytes", "tokens_per_s"))
    if sizes[0] and sizes[1]:
        line += f"; {sizes[0] / sizes[1]:.0%} of its bytes"
    if speeds[0] and speeds[1]:
        line += f", {speeds[0] / speeds[1]:.1f} times its speed"
    return line


def axis_name(path: str) -> str:
    """'criterion' for criterion.name, 'fusion' for fuse.fusion."""
    section, _, last = path.rpartition(".")
    return section if last in ("name", "path") else last


def _cell(mean: float | None, spread: float | None = None, scale: float = 1.0) -> str:
    if mean is None:
        return "–"
    digits = 0 if abs(mean * scale) >= 1000 else 1
    text = f"{mean * scale:.{digits}f}" if abs(mean * scale) < 1e5 else f"{mean * scale:.2e}"
    return text if not spread else f"{text} ± {spread * scale:.{digits}f}"
