"""The charts of a sweep: a measure of quality against what it costs, one line a setting, its Pareto front marked."""

from typing import Any

from flows.pages.run_charts import tips
from flows.pages.run_page import NAMES
from tasks.config import ACCURACIES, PERPLEXITIES

QUALITY = {
    **{text: f"{NAMES[text]} perplexity" for text in PERPLEXITIES},
    **{task: f"{NAMES[task]}, %" for task in ACCURACIES},
    "average": "average accuracy, %",
}
COSTS = {
    "parameters_m": "parameters, M",
    "kept_m": "prunable parameters kept, M",
    "megabytes": "weights, MB",
    "tokens_per_s": "tokens a second",
}


def trade(quality: str, cost: str, labels: list[str], ghosts: bool, spreads: bool) -> dict[str, Any]:
    """Points with their spread over the seeds, joined along the ratios; a ring marks a model's Pareto front.

    ghosts, spreads: whether there are any; Vega complains about a layer without data.
    """
    logarithmic = {"type": "log", "nice": False, "padding": 10}
    scale = logarithmic if quality in PERPLEXITIES else {"zero": False, "padding": 10}
    x = {
        "field": cost,
        "type": "quantitative",
        "title": COSTS[cost],
        "axis": {"tickCount": 6},
        "scale": {"zero": False, "padding": 14},
    }
    y = {"type": "quantitative", "title": None, "scale": scale}
    color = {
        "field": "setting",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": labels, "range": [f"var(--line-{place % 16})" for place in range(len(labels))]},
    }
    mean = {**y, "field": quality}
    layers = [
        _lines(mean, color),
        *([_spreads(quality, y, color)] if spreads else []),
        _points(quality, mean, color),
        _rings(quality, cost, mean),
    ]
    if ghosts:
        layers.insert(0, _published(quality, cost, y))
    return {
        "transform": [{"filter": f"isValid(datum.{quality}) && isValid(datum.{cost})"}],
        "height": 230,
        "encoding": {"x": x},
        "layer": layers,
    }


def _lines(mean: dict[str, Any], color: dict[str, Any]) -> dict[str, Any]:
    """A line a setting from ratio to ratio."""
    return {
        "transform": [{"filter": "datum.variant !== 'dense'"}],
        "mark": {"type": "line", "strokeWidth": 1.2, "opacity": 0.55, "aria": False},
        "encoding": {
            "y": mean,
            "color": color,
            "order": {"field": "ratio", "type": "quantitative"},
            "detail": [{"field": name} for name in ("model", "data", "variant")],
        },
    }


def _spreads(quality: str, y: dict[str, Any], color: dict[str, Any]) -> dict[str, Any]:
    """An upright line through a point, as long as its spread over the seeds."""
    return {
        "transform": [{"filter": f"isValid(datum.{quality}_low)"}],
        "mark": {"type": "rule", "strokeWidth": 1.4, "aria": False},
        "encoding": {"y": {**y, "field": f"{quality}_low"}, "y2": {"field": f"{quality}_high"}, "color": color},
    }


def _points(quality: str, mean: dict[str, Any], color: dict[str, Any]) -> dict[str, Any]:
    """A point a setting and variant, whose shape says which variant."""
    shape = {
        "field": "variant",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["dense", "pruned", "recovered"], "range": ["square", "circle", "triangle-up"]},
    }
    return {
        "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
        "encoding": {"y": mean, "color": color, "shape": shape, "tooltip": _tips(quality)},
    }


def _rings(quality: str, cost: str, mean: dict[str, Any]) -> dict[str, Any]:
    """A ring around each point of the Pareto front."""
    return {
        "transform": _front(quality, cost),
        "mark": {
            "type": "point",
            "shape": "circle",
            "size": 190,
            "stroke": "var(--ink)",
            "strokeWidth": 1.3,
            "fill": None,
            "description": "on the Pareto front",
        },
        "encoding": {"y": mean, "tooltip": _tips(quality)},
    }


def _published(quality: str, cost: str, y: dict[str, Any]) -> dict[str, Any]:
    """The paper's own figures, as dashed diamonds."""
    about = tips(
        ("published_method", "the paper's"),
        ("model", "model"),
        ("ratio", "ratio"),
        ("published", "as printed", ".4~g"),
    )
    return {
        "data": {"name": "ghosts"},
        "transform": [{"filter": f"datum.benchmark === '{quality}' && isValid(datum.{cost})"}],
        "mark": {
            "type": "point",
            "shape": "diamond",
            "size": 60,
            "stroke": "var(--dense)",
            "fill": None,
            "strokeDash": [2, 2],
        },
        "encoding": {"y": {**y, "field": "published"}, "tooltip": about},
    }


def _front(quality: str, cost: str) -> list[dict[str, Any]]:
    """Keep what no other point of its model and data beats: the best quality among all that cost no more."""
    best = {"op": "min" if quality in PERPLEXITIES else "max", "field": quality, "as": "best"}
    dear = "descending" if cost == "tokens_per_s" else "ascending"  # of tokens a second, more is better
    among = {"sort": [{"field": cost, "order": dear}], "groupby": ["model", "data"], "frame": [None, 0]}
    return [{"window": [best], **among, "ignorePeers": False}, {"filter": f"datum.{quality} === datum.best"}]


def _tips(quality: str) -> list[dict[str, Any]]:
    return tips(
        ("setting", "setting"),
        ("model", "model"),
        ("ratio", "ratio"),
        ("variant", "variant"),
        ("seeds", "seeds"),
        (quality, QUALITY[quality], ".4~g"),
        (f"{quality}_spread", "spread over the seeds", ".3~g"),
        ("parameters_m", "parameters, M", ",.1f"),
        ("megabytes", "weights, MB", ",.0f"),
        ("tokens_per_s", "tokens/s", ",.1f"),
    )
