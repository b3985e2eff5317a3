"""A sweep as a picture: one panel a measure, the settings side by side, ratios in colours."""

from pathlib import Path

from flows.compare import PAPER_MODEL, Comparison, Row, axis_name
from flows.report import SHORT
from storage.errors import StorageError
from tasks.config import ACCURACIES, PERPLEXITIES

_TITLES = {
    "wikitext2": "WikiText-2 perplexity",
    "ptb": "PTB perplexity",
    **{task: f"{SHORT[task]}, %" for task in ACCURACIES},
    "average": "average of seven accuracies, %",
}


def draw(comparison: Comparison, file: Path) -> None:
    """Write a PNG, PDF or SVG, by the file's suffix.

    A point a setting, joined where the one axis is a number, with the spread over the seeds as whiskers. Perplexities
    are on a logarithmic axis, the dense model is a dashed line, the paper's LLaMA-7B are diamonds.

    Raises StorageError when there is nothing to draw or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in comparison.rows if row.variant != "dense"]
    measures = [m for m in comparison.measures if m in _TITLES and any(m in row.means for row in rows)]
    variants = [v for v in ("pruned", "recovered") if any(row.variant == v and row.means for row in rows)]
    if not measures:
        raise StorageError("nothing to draw: no run of this sweep has been evaluated; start it with saap sweep")
    settings = list(dict.fromkeys(row.chosen for row in rows))
    size = (max(4.0, 1.2 + 0.45 * len(settings)) * len(measures), 3.4 * len(variants))
    figure, panels = pyplot.subplots(len(variants), len(measures), figsize=size, squeeze=False, layout="constrained")
    for down, variant in enumerate(variants):
        for across, measure in enumerate(measures):
            panel = panels[down][across]
            _panel(panel, [row for row in rows if row.variant == variant], settings, measure)
            for dense in (row.mean(measure) for row in comparison.rows if row.variant == "dense"):
                if dense is not None:
                    panel.axhline(dense, color="black", linestyle="--", linewidth=0.8, label="dense")
            panel.set_title(f"{_TITLES[measure]}, {variant}", fontsize=9)
            panel.set_xlabel(", ".join(map(axis_name, comparison.axes)))
    handles = {label: handle for handle, label in zip(*panels[0][0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7)
    try:
        figure.savefig(file, dpi=160)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot write {file}: {error}") from error
    finally:
        pyplot.close(figure)


def _panel(panel, rows: list[Row], settings: list[tuple[str, ...]], measure: str) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import LogFormatter

    aims = list(dict.fromkeys(row.aim for row in sorted(rows, key=lambda row: row.ratio)))
    numbers = _numbers(settings)
    for index, aim in enumerate(aims):
        here = [row for row in rows if row.aim == aim and row.mean(measure) is not None]
        value = [row.mean(measure) for row in here]
        spread = [row.spread(measure) or 0.0 for row in here]
        place = [settings.index(row.chosen) for row in here]
        aside = 0.3 * ((index + 0.5) / len(aims) - 0.5)  # ratios of one setting stand next to each other
        at = [p + aside for p in place] if numbers is None else [numbers[p] for p in place]
        label = aim if any(row.target for row in here) else f"ratio {aim}"
        style = {"marker": "o", "markersize": 4, "capsize": 3, "linestyle": "none" if numbers is None else "-"}
        panel.errorbar(at, value, spread, color=f"C{index}", label=label, **style)
        published = [(x, row.published[measure]) for x, row in zip(at, here, strict=True) if measure in row.published]
        if published:
            panel.scatter(*zip(*published, strict=True), marker="D", s=22, facecolors="none", edgecolors=f"C{index}",
                          label=f"paper, {PAPER_MODEL}, {aim}")  # fmt: skip
    if numbers is None:
        panel.set_xticks(range(len(settings)), [", ".join(s) for s in settings], rotation=40, ha="right", fontsize=7)
        panel.set_xlim(-0.5, len(settings) - 0.5)
    else:
        panel.set_xticks(numbers)
    if measure in PERPLEXITIES:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    panel.tick_params(axis="y", which="both", labelsize=6)
    panel.grid(axis="y", which="both", linewidth=0.3)


def _numbers(settings: list[tuple[str, ...]]) -> list[float] | None:
    """The values of the one axis, if it is one of numbers."""
    try:
        return [float(value) for (value,) in settings]
    except ValueError:
        return None
