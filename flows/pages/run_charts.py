"""The charts of a run as Vega-Lite specifications, in the colours of the page: its style makes them light or dark."""

from typing import Any

VARIANTS = ("dense", "pruned", "recovered")
_BY_VARIANT: dict[str, Any] = {
    "field": "variant",
    "type": "nominal",
    "scale": {"domain": list(VARIANTS), "range": [f"var(--{variant})" for variant in VARIANTS]},
    "legend": None,
}
CELLS = 64  # cells for the channels of a layer; fewer in a model with many layers


def tips(*fields: tuple[str, str] | tuple[str, str, str]) -> list[dict[str, Any]]:
    """Lines of a tooltip: (field, title) or (field, title, number format)."""
    return [
        {"field": name, "title": title, **({"format": form[0], "type": "quantitative"} if form else {})}
        for name, title, *form in fields
    ]


def scores(kind: str, benchmarks: list[str]) -> dict[str, Any]:
    """Benchmarks down, the value of each variant with its standard error across. kind: accuracy or perplexity."""
    perplexity = kind == "perplexity"
    scale = {"type": "log", "nice": False, "padding": 12} if perplexity else {"zero": False, "padding": 12}
    title = "perplexity, lower is better" if perplexity else "accuracy in %, higher is better"
    y = {
        "field": "benchmark",
        "type": "nominal",
        "sort": benchmarks,
        "title": None,
        "axis": {"grid": True, "tickBand": "extent"},
    }
    offset = {"field": "variant", "sort": list(VARIANTS)}
    x = {"type": "quantitative", "title": title, "scale": scale}
    tooltip = tips(
        ("variant", "variant"),
        ("benchmark", "benchmark"),
        ("shown", "value", ".4~g"),
        ("shown_error", "standard error", ".3~g"),
        ("n", "items"),
        ("verdict", "against dense"),
    )
    return {
        "transform": [{"filter": f"datum.kind === '{kind}'"}],
        "height": 39 * len(benchmarks),
        "encoding": {"y": y, "yOffset": offset, "color": _BY_VARIANT},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "size": 55, "strokeWidth": 1.6, "opacity": 1},
                "encoding": {
                    "x": {**x, "field": "shown"},
                    "fill": {"condition": {"test": "datum.more_than_noise", "value": "var(--paper)"}, **_BY_VARIANT},
                    "tooltip": tooltip,
                },
            },
        ],
    }


def bars(field: str, title: str, form: str, count: int) -> dict[str, Any]:
    """One measure, a bar a variant, the number beside it."""
    y = {
        "field": "variant",
        "type": "nominal",
        "sort": list(VARIANTS),
        "title": None,
        "axis": {"ticks": False, "domain": False},
    }
    x = {
        "field": field,
        "type": "quantitative",
        "title": title,
        "axis": {"tickCount": 4},
        "scale": {"padding": 30, "domainMin": 0},
    }
    return {
        "transform": [{"filter": f"isValid(datum.{field})"}],
        "height": 26 * count,
        "encoding": {"y": y, "x": x},
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 2, "height": {"band": 0.7}},
                "encoding": {"color": _BY_VARIANT},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 5, "color": "var(--ink)", "aria": False},
                "encoding": {"text": {"field": field, "type": "quantitative", "format": form}},
            },
        ],
    }


def kept(kind: str) -> dict[str, Any]:
    """What is left of each layer, the outline of the dense model behind it."""
    tooltip = tips(("layer", "layer"), ("units", "dense"), ("kept", "kept"), ("share", "kept", ".1%"))
    x = {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0, "labelOverlap": True}}
    return {
        "transform": [{"filter": f"datum.kind === '{kind}'"}],
        "height": 150,
        "encoding": {"x": x, "tooltip": tooltip},
        "layer": [
            {
                "mark": {
                    "type": "bar",
                    "fill": "transparent",
                    "stroke": "var(--dense)",
                    "strokeWidth": 1,
                    "aria": False,
                },
                "encoding": {
                    "y": {
                        "field": "units",
                        "type": "quantitative",
                        "title": None,
                        "axis": {"tickMinStep": 1, "tickCount": 5},
                    }
                },
            },
            {
                "mark": {"type": "bar", "color": "var(--pruned)"},
                "encoding": {"y": {"field": "kept", "type": "quantitative"}},
            },
        ],
    }


def importance(kind: str, samples: bool, layers: int) -> dict[str, Any]:
    """Layers down, the groups of a layer across in the order they go, coloured by their place in all of the kind."""
    step = max(4, min(12, 360 // layers))
    y = {
        "field": "layer",
        "type": "ordinal",
        "title": None,
        "axis": {"labelOverlap": True, "ticks": False, "grid": False},
    }
    return {
        "transform": [{"filter": f"datum.kind === '{kind}'"}],
        "height": step * layers,
        "encoding": {"y": y},
        "layer": [_cells(samples), _cuts(step)],
    }


def _cells(samples: bool) -> dict[str, Any]:
    """A rectangle a cell, as wide as its share of the layer's groups."""
    x = {
        "field": "from",
        "type": "quantitative",
        "title": "share of the layer's groups, the first to go at the left",
        "scale": {"domain": [0, 1], "nice": False},
        "axis": {"format": "%", "tickCount": 5, "grid": False},
    }
    color = {
        "field": "percentile",
        "type": "quantitative",
        "title": "place among all, %",
        "scale": {"scheme": "viridis", "domain": [0, 100]},
        "legend": {"orient": "top", "direction": "horizontal", "gradientLength": 160},
    }
    return {
        "mark": {"type": "rect", "aria": False, "strokeWidth": 0},
        "encoding": {"x": x, "x2": {"field": "to"}, "color": color, "tooltip": _cell_tips(samples)},
    }


def _cell_tips(samples: bool) -> list[dict[str, Any]]:
    """What a cell says of its groups; with samples, their importance over the calibration samples too."""
    lines = tips(
        ("layer", "layer"),
        ("unit", "group"),
        ("groups", "groups in this cell"),
        ("removed", "of them removed"),
        ("rank_score", "what it is ranked by", ".4~g"),
        ("percentile", "place among all, %", ".1f"),
    )
    if samples:
        lines += tips(
            ("element_mean", "fine importance, mean of the samples", ".3~g"),
            ("element_sd", "… standard deviation", ".3~g"),
            ("element_min", "… lowest", ".3~g"),
            ("element_max", "… highest", ".3~g"),
            ("vector_mean", "coarse importance, mean", ".3~g"),
            ("vector_sd", "… standard deviation", ".3~g"),
        )
    return lines


def _cuts(height: int) -> dict[str, Any]:
    """A line a layer between what was removed and what is left."""
    mark = {"type": "tick", "orient": "vertical", "color": "var(--cut)", "thickness": 3, "height": height, "opacity": 1}
    return {
        "transform": [{"filter": "datum.cell === 0 && datum.cut > 0"}],
        "mark": mark,
        "encoding": {
            "x": {"field": "cut", "type": "quantitative"},
            "tooltip": tips(("layer", "layer"), ("cut", "removed", ".1%")),
        },
    }


def losses() -> dict[str, Any]:
    """Training loss a step as a line, the held-out loss as points."""
    y = {"type": "quantitative", "title": None, "scale": {"zero": False}}
    return {
        "height": 220,
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "optimiser step", "axis": {"tickMinStep": 1}}
        },
        "layer": [
            {
                "mark": {
                    "type": "line",
                    "color": "var(--dense)",
                    "strokeWidth": 1.5,
                    "point": {"size": 12, "color": "var(--dense)"},
                },
                "encoding": {
                    "y": {**y, "field": "loss"},
                    "tooltip": tips(("step", "step"), ("loss", "training loss", ".4f")),
                },
            },
            {
                "transform": [{"filter": "isValid(datum.held_out_loss)"}],
                "mark": {
                    "type": "line",
                    "color": "var(--recovered)",
                    "point": {"size": 60, "color": "var(--recovered)"},
                },
                "encoding": {
                    "y": {**y, "field": "held_out_loss"},
                    "tooltip": tips(("step", "step"), ("held_out_loss", "held-out loss", ".4f")),
                },
            },
        ],
    }


def timeline(lanes: list[str], computed: bool, cached: bool) -> dict[str, Any]:
    """A bar from start to end for what was computed, a mark for what was found in the store."""
    tooltip = tips(("what", "step"), ("seconds", "seconds to compute", ",.1f"), ("found", "found in the store"))
    y = {"field": "lane", "type": "nominal", "sort": lanes, "title": None, "axis": {"grid": True, "tickBand": "extent"}}
    x = {
        "type": "quantitative",
        "title": "seconds since the start",
        "axis": {"tickCount": 10},
        "scale": {"domainMin": 0},
    }
    layers: list[dict[str, Any]] = []
    if computed:
        layers.append(
            {
                "transform": [{"filter": "datum.cached === false && isValid(datum.seconds)"}],
                "mark": {
                    "type": "bar",
                    "color": "var(--recovered)",
                    "stroke": "var(--paper)",
                    "strokeWidth": 1,
                    "height": {"band": 0.7},
                },
                "encoding": {"x": {**x, "field": "start"}, "x2": {"field": "end"}},
            }
        )
    if cached:
        layers.append(
            {
                "transform": [{"filter": "datum.cached === true"}],
                "mark": {
                    "type": "point",
                    "shape": "diamond",
                    "filled": True,
                    "size": 60,
                    "color": "var(--dense)",
                    "opacity": 1,
                },
                "encoding": {"x": {**x, "field": "end"}},
            }
        )
    return {"height": 20 * len(lanes), "encoding": {"y": y, "tooltip": tooltip}, "layer": layers}
