"""The sections of a run's page, each from one question to the warehouse."""

from collections.abc import Callable
from typing import Any

from flows.pages import run_charts as charts
from flows.pages.section import Chart, Column, Rows, Section, ask, digits, words, yes
from flows.printing import rounded
from tasks.config import ACCURACIES, PERPLEXITIES

NAMES = {
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "openbookqa": "OpenBookQA",
    "wikitext2": "WikiText-2",
    "ptb": "PTB",
}
KINDS = {"attention": "Attention: heads", "expert": "Experts", "mlp": "MLP: channels"}
LEGEND = (("dense", "dense"), ("pruned", "pruned"), ("recovered", "recovered"))

SCORES = """
select m.variant, m.benchmark, m.metric, m.value, m.stderr, m.n, s.difference, s.basis, s.p_value, s.more_than_noise
from metrics m left join significance s
    on s.run_a = ? and s.run_b = ? and s.variant_a = 'dense' and s.variant_b = m.variant and s.benchmark = m.benchmark
    and s.metric = m.metric and s.protocol = m.protocol and s.data = m.data
where m.run_id = ? and m.papers"""
SIZES = """
select s.variant, s.parameters, s.active_parameters, s.weight_bytes, s.tokens_per_s, s.tokens_per_s_spread,
    s.decode_ratio, s.prefill_tokens_per_s, s.prefill_ratio, s.peak_bytes, s.macs_per_token, s.dtype, r.wikitext2,
    s.device, s.threads, s.prompt_tokens, s.new_tokens, s.runs
from speed s left join results r using (run_id, variant) where run_id = ?
order by list_position(['dense', 'pruned', 'recovered'], variant) nulls last, variant"""
KEPT = """
select layer, kind, units, kept, kept / units as share, parameters, kept_parameters
from widths where run_id = ? order by kind, layer"""
LOSSES = """
with numbered as (select *, count(*) over () as steps from training where run_id = ?)
select step, epoch, loss, held_out_loss, learning_rate, tokens_per_s from numbered
where step % ceil(steps / 2000) = 0 or step = 1 or held_out_loss is not null order by step"""
STEPS = """
select s.position, s.stage, s.variant, s.benchmark, s.cached, s.seconds, s.skipped,
    epoch(s.finished_at - r.started_at) as end
from stage_runs s join runs r using (run_id) where run_id = ? order by position"""
# A cell is a share of a layer's groups in the order they go; the group in its middle stands for it. The first parameter
# is 1 where the lowest scores go first and -1 where the highest do.
CELLS = """
with scored as (
    select *, 100 * percent_rank() over (partition by kind order by rank_score) as place,
        row_number() over (partition by kind, layer order by rank_score * ?, unit) - 1 as rank,
        count(*) over (partition by kind, layer) as units
    from groups where run_id = ?),
celled as (select *, floor(rank * least(units, ?) / units)::integer as cell from scored),
cells as (
    select kind, layer, cell, any_value(units) as units, min(rank) as first, count(*) as groups,
        avg(place) as percentile
    from celled group by all)
select c.kind, c.layer, c.cell, c.first / c.units as "from", (c.first + c.groups) / c.units as to, c.groups, m.unit,
    m.rank_score, c.percentile, 1 - w.kept / w.units as cut,
    greatest(0, least(c.groups, w.units - w.kept - c.first)) as removed
from cells c join celled m on (m.kind, m.layer, m.rank) = (c.kind, c.layer, c.first + c.groups // 2)
    left join widths w on w.run_id = ? and w.kind = c.kind and w.layer = c.layer
order by c.kind, c.layer, c.cell"""
SPREAD = """
select i.kind, i.layer, i.unit, avg(element) as element_mean, stddev_samp(element) as element_sd,
    min(element) as element_min, max(element) as element_max, avg(vector) as vector_mean,
    stddev_samp(vector) as vector_sd
from importance i semi join (select unnest(?) as kind, unnest(?) as layer, unnest(?) as unit) w
    on (w.kind = i.kind and w.layer = i.layer and w.unit = i.unit)
where i.key = ? group by all"""


def scores(connection: Any, run_id: str, absent: Callable[[str], str]) -> Section:
    order = {name: place for place, name in enumerate((*ACCURACIES, *PERPLEXITIES))}
    rows = ask(connection, SCORES, run_id, run_id, run_id)
    rows.sort(key=lambda row: (order.get(row["benchmark"], 99), charts.VARIANTS.index(row["variant"])))
    for row in rows:
        scale = 1 if row["metric"] == "perplexity" else 100
        low, high = ((row["value"] + side * (row["stderr"] or 0)) * scale for side in (-1, 1))
        row |= {
            "kind": "perplexity" if scale == 1 else "accuracy",
            "shown": row["value"] * scale,
            "low": low,
            "high": high,
        }
        row["shown_error"] = None if row["stderr"] is None else row["stderr"] * scale
        row["verdict"] = _verdict(row)
        row["benchmark"] = NAMES.get(row["benchmark"], row["benchmark"])
    drawn = []
    for kind, caption in (
        ("accuracy", "Accuracies, with one standard error"),
        ("perplexity", "Perplexities, logarithmic"),
    ):
        if names := list(dict.fromkeys(row["benchmark"] for row in rows if row["kind"] == kind)):
            drawn.append(Chart(charts.scores(kind, names), caption, wide=False))
    columns = (
        words("benchmark", "benchmark"), words("variant", "variant"), words("metric", "metric"),
        Column("shown", "value", rounded), Column("shown_error", "standard error", rounded),
        Column("n", "items", digits(0)),
        Column("p_value", "p against dense", rounded), words("verdict", "against dense"),
        Column("value", "value as stored", rounded),
    )  # fmt: skip
    return Section("scores", "Benchmarks",
        "A filled circle is no further from dense than noise explains; an open one is (p < 0.05, paired over "
        "the items where they are known). Accuracies in %, the papers' metric of each task.",
        columns, rows, drawn, None if rows else absent("evaluate"), legend=LEGEND)  # fmt: skip


def _verdict(row: dict[str, Any]) -> str:
    if row["variant"] == "dense" or row["more_than_noise"] is None:
        return "–"
    if not row["more_than_noise"]:
        return "within noise"
    return "better" if (row["difference"] > 0) != (row["metric"] == "perplexity") else "worse"


def sizes(connection: Any, run_id: str, absent: Callable[[str], str]) -> Section:
    rows = ask(connection, SIZES, run_id)
    if not rows:
        return Section("sizes", "Size, speed and perplexity", missing=absent("speed"))
    for row in rows:
        row["megabytes"] = row["weight_bytes"] / 1e6
        row["peak_bytes"] = row["peak_bytes"] if row["peak_bytes"] == row["peak_bytes"] else None  # NaN on a CPU
    sparse = any(row["active_parameters"] not in (None, row["parameters"]) for row in rows)
    active = [Column("active_parameters", "active parameters, M", digits(1, 1e-6))] if sparse else []
    columns = (
        words("variant", "variant"), Column("parameters", "parameters, M", digits(1, 1e-6)), *active,
        Column("weight_bytes", "weights, MB", digits(1, 1e-6)), Column("tokens_per_s", "tokens/s", digits(1)),
        Column("tokens_per_s_spread", "IQR / median", digits(3)), Column("decode_ratio", "× dense", digits(2)),
        Column("prefill_tokens_per_s", "prefill, tokens/s", digits(0)),
        Column("prefill_ratio", "prefill × dense", digits(2)),
        Column("peak_bytes", "peak, MB", digits(0, 1e-6)), Column("macs_per_token", "MACs a token, M", digits(0, 1e-6)),
        Column("wikitext2", "WikiText-2", rounded), words("dtype", "dtype"),
    )  # fmt: skip
    drawn = [
        Chart(charts.bars(field, title, form, sum(row[field] is not None for row in rows)), caption, wide=False)
        for field, title, form, caption in (
            ("megabytes", "weights, MB", ",.0f", "Size"),
            ("tokens_per_s", "tokens a second, decoding", ",.1f", "Speed"),
            ("wikitext2", "WikiText-2 perplexity, lower is better", ",.4~r", "Quality"),
        )
        if any(row[field] is not None for row in rows)
    ]
    one = rows[0]
    lead = f"On {one['device']}, {one['threads']} threads: a prompt of {one['prompt_tokens']} tokens, "
    lead += f"then {one['new_tokens']} new ones."
    return Section("sizes", "Size, speed and perplexity", lead, columns, rows, drawn, legend=LEGEND)


def kept(connection: Any, run_id: str, absent: Callable[[str], str]) -> Section:
    rows = ask(connection, KEPT, run_id)
    columns = (
        Column("layer", "layer"), words("kind", "kind"), Column("units", "dense", digits(0)),
        Column("kept", "kept", digits(0)),
        Column("share", "share kept, %", digits(1, 100)), Column("parameters", "parameters, dense", digits(0)),
        Column("kept_parameters", "parameters kept", digits(0)),
    )  # fmt: skip
    kinds = {row["kind"] for row in rows}
    drawn = [Chart(charts.kept(kind), caption) for kind, caption in KINDS.items() if kind in kinds]
    return Section("kept", "What stays, layer by layer", "The outline is the dense model.", columns, rows, drawn,
                   None if rows else absent("prune"))  # fmt: skip


def importance(connection: Any, run_id: str, absent: Callable[[str], str], direction: str) -> Section:
    sign = 1 if direction == "lowest" else -1
    layers = ask(connection, "select count(distinct layer) as layers from groups where run_id = ?", run_id)[0]["layers"]
    cells = min(charts.CELLS, 2400 // max(layers, 1))
    rows = ask(connection, CELLS, sign, run_id, cells, run_id)
    keys = ask(connection, "select key from stage_runs where run_id = ? and stage = 'score'", run_id)
    title = "Importance by layer"
    if not rows:
        return Section("importance", title, missing=absent("ranking"))
    sampled = _spread(connection, rows, keys[0]["key"]) if keys else False
    columns = [
        Column("layer", "layer"), words("kind", "kind"), Column("cell", "cell"), Column("groups", "groups", digits(0)),
        Column("removed", "removed"), Column("unit", "group in its middle"), Column("rank_score", "ranked by", rounded),
        Column("percentile", "place among all, %", digits(1)), Column("cut", "removed of the layer, %", digits(1, 100)),
    ]  # fmt: skip
    lead = (
        "Each row is a layer, its groups in the order they go; the colour is a group's place among all of its kind in "
        "what the criterion ranks by. Left of the red line is removed. "
        f"A cell is a {cells}th of a layer at the least; hover to see the group in its middle"
    )
    if sampled:
        lead += ", with its spread over the calibration samples"
        columns += [Column("element_mean", "fine, mean", rounded), Column("element_sd", "fine, sd", rounded),
                    Column("element_min", "fine, lowest", rounded), Column("element_max", "fine, highest", rounded),
                    Column("vector_mean", "coarse, mean", rounded),
                    Column("vector_sd", "coarse, sd", rounded)]  # fmt: skip
    kinds = {row["kind"] for row in rows}
    drawn = [
        Chart(charts.importance(kind, sampled, layers), caption, wide=False)
        for kind, caption in ((kind, f"{name}, by layer") for kind, name in KINDS.items() if kind in kinds)
    ]
    return Section("importance", title, lead + ".", columns, rows, drawn)


def _spread(connection: Any, rows: Rows, key: str) -> bool:
    """Give each cell the mean and spread over the samples of its middle group. False when the scores are gone."""
    wanted = ([row[name] for row in rows] for name in ("kind", "layer", "unit"))
    found = ask(connection, SPREAD, *wanted, key)
    by_group = {(row["kind"], row["layer"], row["unit"]): row for row in found}
    for row in rows if found else ():
        row |= by_group[row["kind"], row["layer"], row["unit"]]
    return bool(found)


def losses(connection: Any, run_id: str, absent: Callable[[str], str]) -> Section:
    rows = ask(connection, LOSSES, run_id)
    columns = (
        Column("step", "step", digits(0)), Column("epoch", "epoch", digits(2)),
        Column("loss", "training loss", digits(4)),
        Column("held_out_loss", "held-out loss", digits(4)), Column("learning_rate", "learning rate", rounded),
        Column("tokens_per_s", "tokens/s", digits(0)),
    )  # fmt: skip
    return Section("losses", "Recovery", "The checkpoint with the lowest held-out loss is kept.", columns, rows,
                   [Chart(charts.losses(), "Loss, nats a token")], None if rows else absent("recover"),
                   legend=(("dense", "training loss"), ("recovered", "held-out loss")))  # fmt: skip


def steps(connection: Any, run_id: str, absent: Callable[[str], str]) -> Section:
    rows = ask(connection, STEPS, run_id)
    for row in rows:
        row["lane"] = " ".join(filter(None, (row["stage"], row["variant"])))
        row["what"] = " ".join(filter(None, (row["stage"], row["variant"], row["benchmark"])))
        row["found"] = yes(row["cached"])
        computed = row["seconds"] if row["seconds"] is not None and not row["cached"] else 0.0
        row["start"] = max(0.0, row["end"] - computed)
    columns = (
        words("what", "step"), Column("seconds", "seconds to compute", digits(1)),
        Column("cached", "found in the store", yes, number=False), Column("start", "from, s", digits(1)),
        Column("end", "to, s", digits(1)), words("skipped", "skipped because"),
    )  # fmt: skip
    spent = sum(row["seconds"] or 0 for row in rows if not row["cached"])
    saved = sum(row["seconds"] or 0 for row in rows if row["cached"])
    lead = f"{spent:,.0f} seconds of computing; a diamond was found in the store"
    lead += f", which saved {saved:,.0f} seconds." if saved else "."
    lanes = list(dict.fromkeys(row["lane"] for row in rows))
    kinds = (any(row["cached"] is cached for row in rows) for cached in (False, True))
    return Section("steps", "Time", lead, columns, rows, [Chart(charts.timeline(lanes, *kinds))],
                   None if rows else absent("first"),
                   legend=(("recovered", "computed"), ("dense", "found in the store")))  # fmt: skip
