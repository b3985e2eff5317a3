"""The runs of a sweep side by side: means and spreads over its calibration seeds, the paper's numbers beside them.

Read from the artifacts that the sweep's own keys name: no other run can slip in, and what is missing shows.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.dag import build
from flows.sweep import combinations
from storage.artifacts import ArtifactStore
from storage.tables import read_table
from storage.warehouse import Warehouse
from tasks.config import ACCURACIES, load_config, parse_value
from tasks.step import Step

RANKING = ("score", "gradients", "activations", "fisher", "fuse", "fluctuation", "rank")  # what a criterion costs
MEASURES = ("wikitext2", "ptb", "average", "parameters", "weight_bytes", "tokens_per_s")
PAPER_MODEL = "llama-7b"


@dataclass
class Row:
    """One setting of the axes and one variant. values: measure → a number a calibration seed; accuracies in percent."""

    chosen: tuple[str, ...]
    ratio: float
    variant: str
    runs: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of ranking
    published: dict[str, float] = field(default_factory=dict)  # measure → the paper's number
    misprint: bool = False

    def mean(self, measure: str) -> float | None:
        found = self.values.get(measure)
        return statistics.fmean(found) if found else None

    def spread(self, measure: str) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        found = self.values.get(measure, [])
        return statistics.stdev(found) if len(found) > 1 else None


@dataclass
class Comparison:
    """axes: what the sweep varies, but for ratio and seed; rows in the order of the sweep, dense first."""

    axes: list[str]
    rows: list[Row]
    missing: int  # runs without all their numbers
    runs: int


def compare(config: str, overrides: tuple[str, ...] = ()) -> Comparison:
    """What the store holds of a sweep. Raises ConfigError for a file without a [sweep] table."""
    sweep = combinations(config)
    rows: dict[tuple[Any, ...], Row] = {}
    axes: list[str] = []
    missing, store = 0, Path()
    for chosen in sweep:
        values = {path: parse_value(text) for path, _, text in (choice.partition("=") for choice in chosen)}
        axes = [path for path in values if path not in ("prune.ratio", "calibrate.seed")]
        settings = load_config(config, (*chosen, *overrides))
        store = Path(settings.store)
        steps = build(settings)
        artifacts = ArtifactStore(store)
        manifests = {step.key: artifacts.inspect(step.stage, step.key)[0] for step in steps}
        missing += None in manifests.values()
        ranking = [manifests[step.key] for step in steps if step.stage in RANKING]
        for variant, found in _measured(artifacts, steps, manifests):
            if variant == "dense":  # one model, whatever is cut from it
                row = Row(tuple(str(values[axis]) if axis == "model.path" else "" for axis in axes), 0.0, variant)
            else:
                row = Row(tuple(str(values[axis]) for axis in axes), settings.prune.ratio, variant)
            row = rows.setdefault((row.variant, row.ratio, row.chosen), row)
            if variant == "dense" and row.runs:
                continue
            row.runs += 1
            row.seconds.append(sum(manifest["seconds"] for manifest in ranking if manifest))
            for measure, value in found.items():
                row.values.setdefault(measure, []).append(value)
    order = {"dense": 0, "pruned": 1, "recovered": 2}
    ordered = sorted(rows.values(), key=lambda row: (order[row.variant], row.ratio))
    for row in ordered:
        row.published, row.misprint = _published(store, row, axes)
    return Comparison(axes, ordered, missing, len(sweep))


def _measured(
    artifacts: ArtifactStore, steps: list[Step], manifests: dict[str, dict[str, Any] | None]
) -> Iterator[tuple[str, dict[str, float]]]:
    """(variant, measure → value) of one run, for the variants whose benchmarks are all there."""
    evaluations = [step for step in steps if step.stage == "evaluate"]
    for variant in dict.fromkeys(str(step.variant) for step in evaluations):
        mine = [step for step in evaluations if step.variant == variant]
        if any(manifests[step.key] is None for step in mine):
            continue
        values: dict[str, float] = {}
        for step in mine:
            found = read_table(artifacts.path(step.stage, step.key), "metrics")
            for benchmark, value in zip(
                *(found[name][found["papers"]] for name in ("benchmark", "value")), strict=True
            ):
                values[str(benchmark)] = float(value) * (100 if benchmark in ACCURACIES else 1)
        if all(benchmark in values for benchmark in ACCURACIES):
            values["average"] = sum(values[benchmark] for benchmark in ACCURACIES) / len(ACCURACIES)
        for step in steps:
            manifest = manifests[step.key]
            if manifest and step.stage == "prune" and variant == "pruned":
                values["parameters"] = float(manifest["summary"]["parameters"])
            elif manifest and step.stage == "speed":
                speed = read_table(artifacts.path(step.stage, step.key), "speed")
                here = list(speed["variant"]).index(variant)
                values |= {m: float(speed[m][here]) for m in ("parameters", "weight_bytes", "tokens_per_s")}
        yield variant, values


def _published(store: Path, row: Row, axes: list[str]) -> tuple[dict[str, float], bool]:
    """The paper's numbers for LLaMA-7B that answer to this row, and whether they are marked as misprints."""
    if not Warehouse(store).file.exists():
        return {}, False
    settings = [f"{axis_name(axis)}={value}" for axis, value in zip(axes, row.chosen, strict=True)]
    with Warehouse(store).reading() as connection:
        found = connection.execute(
            "with named as (select method from published_names where list_contains(?, setting || '=' || value)) "
            "select benchmark, value, misprint from published_results join named using (method) "
            "where (select count(*) from named) = 1 and model = ? and abs(ratio - ?) < 0.005 "
            "and (tuned = ? or \"table\" in ('X', 'XI')) and \"table\" in ('I', 'X', 'XI', 'XII')",
            [settings, PAPER_MODEL, row.ratio, row.variant == "recovered"],
        ).fetchall()
    numbers = {benchmark: value for benchmark, value, _ in found}
    if "memory_mib" in numbers:
        numbers["weight_bytes"] = numbers["memory_mib"] * 2**20
    return {m: numbers[m] for m in MEASURES if m in numbers}, any(misprint for *_, misprint in found)


_COLUMNS = {
    "wikitext2": ("Wiki2↓", 1.0),
    "ptb": ("PTB↓", 1.0),
    "average": ("avg", 1.0),
    "parameters": ("params M", 1e-6),
    "weight_bytes": ("MB", 1e-6),
    "tokens_per_s": ("tok/s", 1.0),
}


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: mean ± spread over the seeds; 'paper' is LLaMA-7B as printed, for the eye only."""
    shown = [m for m in MEASURES if any(m in row.values for row in comparison.rows)]
    published = any(row.published for row in comparison.rows)
    columns = [*map(axis_name, comparison.axes), "ratio", "variant", "seeds", *(_COLUMNS[m][0] for m in shown)]
    rows = []
    for row in comparison.rows:
        cells = [*row.chosen, f"{row.ratio:g}" if row.ratio else "", row.variant, str(row.runs)]
        cells += [_cell(row.mean(m), row.spread(m), _COLUMNS[m][1]) for m in shown]
        cells.append(_cell(statistics.fmean(row.seconds), None, 1.0) if row.variant != "dense" else "")
        if published:
            numbers = ", ".join(f"{_COLUMNS[m][0]} {v * _COLUMNS[m][1]:g}" for m, v in row.published.items())
            cells.append(numbers + (" (misprint)" if row.misprint else ""))
        rows.append(cells)
    return [*columns, "s to rank", *([f"paper, {PAPER_MODEL}"] if published else [])], rows


def axis_name(path: str) -> str:
    """'criterion' for criterion.name, 'fusion' for fuse.fusion."""
    section, _, last = path.rpartition(".")
    return section if last in ("name", "path") else last


def _cell(mean: float | None, spread: float | None, scale: float) -> str:
    if mean is None:
        return "–"
    digits = 0 if abs(mean * scale) >= 1000 else 1
    text = f"{mean * scale:.{digits}f}" if abs(mean * scale) < 1e5 else f"{mean * scale:.2e}"
    return text if not spread else f"{text} ± {spread * scale:.{digits}f}"
