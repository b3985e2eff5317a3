"""The sections of a sweep's page. A sweep is a set of runs; what they share counts once."""

import json
from collections.abc import Collection
from typing import Any

from flows.pages import sweep_charts as charts
from flows.pages.run_head import flat_fields
from flows.pages.section import Chart, Column, Rows, Section, ask, digits, words
from flows.printing import rounded
from tasks.config import ACCURACIES

# A setting is the configuration without the calibration seed and without what the variant does not depend on: a pruned
# model not on its recovery, a dense one on nothing but model, dtype, data and how it is measured. A run made twice
# counts once.
SETTINGS = f"""
with kept as (select run_id, sum(kept_parameters) as kept, sum(parameters) as prunable from widths group by run_id),
mine as (
    select a.run_id, a.model, a.data, a.criterion, if(a.variant = 'dense', 0, a.ratio) as ratio, a.variant,
        if(a.variant = 'dense', 0, a.seed) as seed, a.wikitext2, a.ptb, 100 * a.average as average, a.seconds_to_rank,
        {", ".join(f"100 * a.{task} as {task}" for task in ACCURACIES)},
        r.parameters, r.weight_bytes, r.tokens_per_s, r.decode_ratio,
        if(a.variant = 'dense', k.prunable, k.kept) as kept,
        case a.variant
            when 'dense' then json_object('model', json_extract(settings, '$.model'), 'data', a.data,
                'evaluate', json_merge_patch(json_extract(settings, '$.evaluate'),
                    '{{"variants": null, "samples": null}}'),
                'speed', json_merge_patch(json_extract(settings, '$.speed'),
                    '{{"runs": null, "warmup": null, "llama_cpp": null}}'))
            when 'pruned' then json_merge_patch(settings, '{{"recover": null, "evaluate": {{"variants": null}}}}')
            else settings end as settings
    from ablations a join results r using (run_id, variant) left join kept k using (run_id)
    where run_id in (select unnest(?))),
once as (
    select distinct on (settings, variant, seed) * from mine
    order by settings, variant, seed, tokens_per_s is null, run_id desc)
select settings, variant, any_value(model) as model, any_value(data) as data, any_value(criterion) as criterion,
    any_value(ratio) as ratio, count(*) as seeds, avg(wikitext2) as wikitext2,
    stddev_samp(wikitext2) as wikitext2_spread,
    avg(ptb) as ptb, stddev_samp(ptb) as ptb_spread, avg(average) as average, stddev_samp(average) as average_spread,
    {", ".join(f"avg({task}) as {task}, stddev_samp({task}) as {task}_spread" for task in ACCURACIES)},
    avg(parameters) as parameters, avg(weight_bytes) as weight_bytes, avg(tokens_per_s) as tokens_per_s,
    avg(decode_ratio) as decode_ratio, avg(kept) as kept, avg(seconds_to_rank) as seconds_to_rank, max(run_id) as run_id
from once group by settings, variant
order by model, data, variant, ratio, wikitext2, settings"""
GHOSTS = """
select distinct v.method as published_method, v.model as published_model, r.model, r.data, v.ratio, v.variant,
    v.benchmark, v.published, v.source, v."table", v.misprint
from versus_published v join runs r using (run_id)
where run_id in (select unnest(?)) and v.benchmark in (select unnest(?)) and v.variant <> 'dense'
order by all"""
REUSE = """
select stage, count(*) as uses, count(*) filter (not cached) as computed, count(*) filter (cached) as reused,
    coalesce(sum(seconds) filter (not cached), 0) as seconds_spent,
    coalesce(sum(seconds) filter (cached), 0) as seconds_saved
from stage_runs where skipped is null and run_id in (select unnest(?)) group by stage
order by seconds_saved desc, stage"""
RUNS = """
select run_id, name, model, criterion, ratio, status, started_at, finished_at, error from runs
where run_id in (select unnest(?)) order by run_id"""


def rows_of(connection: Any, run_ids: list[str]) -> Rows:
    """One row a setting and variant, with its label: the criterion, or 'dense', and what else the sweep varies.

    Of the tasks only those that a row has without the average of all seven.
    """
    rows = ask(connection, SETTINGS, run_ids)
    rest = [t for t in ACCURACIES if not any(row[t] is not None and row["average"] is None for row in rows)]
    flat: list[dict[str, str]] = []
    for row in rows:
        fields = flat_fields(json.loads(row["settings"]))
        flat.append({path: json.dumps(value) for path, value in fields.items()})
    known = {"model.path", "prune.ratio", "prune.target", "criterion.name", "data"}
    seen: dict[str, set[str]] = {}
    for values in flat:
        for path, value in values.items():
            seen.setdefault(path, set()).add(value)
    varied = sorted(path for path, values in seen.items() if len(values) > 1 and path not in known)
    for row, values in zip(rows, flat, strict=True):
        more = [f"{path} = {values[path]}" for path in varied if path in values]
        row["setting"] = ", ".join(["dense" if row["variant"] == "dense" else row["criterion"], *more])
        row["megabytes"], row["parameters_m"], row["kept_m"] = (
            None if row[name] is None else row[name] / 1e6 for name in ("weight_bytes", "parameters", "kept")
        )
        for measure in (name for name in charts.QUALITY if name not in rest):
            mean, spread = row[measure], row[f"{measure}_spread"]
            known_spread = mean is not None and spread is not None
            row[f"{measure}_low"], row[f"{measure}_high"] = (
                (max(mean - spread, mean * 1e-3), mean + spread) if known_spread else (None, None)
            )
        for name in ("settings", *rest, *(f"{task}_spread" for task in rest)):
            del row[name]
    return rows


def settings(rows: Rows, labels: list[str], ghosts: Collection[str]) -> Section:
    """Quality against cost, and the table of everything. ghosts: the benchmarks that the paper has numbers of."""
    if not rows:
        return Section(
            "settings", "Quality against size and speed", missing="No run of the sweep has been evaluated yet."
        )
    qualities = [name for name in charts.QUALITY if any(row.get(name) is not None for row in rows)]
    tasks = [column for name in qualities if name in ACCURACIES for column in
             (Column(name, charts.QUALITY[name], digits(1)), Column(f"{name}_spread", "±", digits(1)))]  # fmt: skip
    sized = any(row["parameters"] is not None for row in rows)
    costs = ["parameters_m", "megabytes", "tokens_per_s"] if sized else ["kept_m"]
    drawn = [
        Chart(charts.trade(quality, cost, labels, quality in ghosts,
                           any(row[f"{quality}_low"] is not None for row in rows)),
              f"{charts.QUALITY[quality]} against {charts.COSTS[cost]}", wide=False)
        for quality in qualities for cost in costs
    ]  # fmt: skip
    columns = (
        words("setting", "setting"), words("model", "model"), Column("ratio", "ratio"), words("variant", "variant"),
        Column("seeds", "seeds"),
        Column("wikitext2", "WikiText-2", rounded), Column("wikitext2_spread", "±", rounded),
        Column("ptb", "PTB", rounded), Column("ptb_spread", "±", rounded),
        *tasks, Column("average", "average, %", digits(1)), Column("average_spread", "±", digits(1)),
        Column("parameters", "parameters, M", digits(1, 1e-6)), Column("weight_bytes", "MB", digits(0, 1e-6)),
        Column("tokens_per_s", "tokens/s", digits(1)), Column("decode_ratio", "× dense", digits(2)),
        Column("seconds_to_rank", "s to rank", digits(1)), words("run_id", "run"), words("data", "data"),
    )  # fmt: skip
    lead = (
        "A circle is a pruned model, a triangle a recovered one, a square the dense one; lines join the ratios of a "
        "setting, bars are one standard deviation over the calibration seeds, and a ring marks what nothing of the "
        "same model beats: the Pareto front of what is ticked. Perplexities are on a logarithmic axis."
    )
    if ghosts:
        lead += " Dashed diamonds are the paper's numbers for the same model and ratio, drawn at our size."
    legend = [(f"line-{place % 16}", label) for place, label in enumerate(labels)]
    return Section("settings", "Quality against size and speed", lead, columns, rows, drawn, open=True, legend=legend)


def ghosts(connection: Any, run_ids: list[str], rows: Rows) -> Section | None:
    """The paper's numbers of the same models and ratios, at the size of ours; None when it has none."""
    found = ask(connection, GHOSTS, run_ids, [name for name in charts.QUALITY if rows and name in rows[0]])
    if not found:
        return None
    for ghost in found:
        ours = [r for r in rows if (r["model"], r["data"], r["ratio"], r["variant"])
                == (ghost["model"], ghost["data"], ghost["ratio"], ghost["variant"])]  # fmt: skip
        for cost in charts.COSTS:
            sizes = [row[cost] for row in ours if row[cost] is not None]
            ghost[cost] = sum(sizes) / len(sizes) if sizes else None
    columns = (
        words("published_method", "method"), words("published_model", "model"), Column("ratio", "ratio"),
        words("variant", "variant"), words("benchmark", "benchmark"), Column("published", "as printed", rounded),
        words("source", "source"), words("table", "table"), words("misprint", "misprint"),
    )  # fmt: skip
    return Section(
        "ghosts", "The paper's numbers beside them", "Of the same model and ratio, as printed.", columns, found
    )


def reuse(connection: Any, run_ids: list[str]) -> Section:
    rows = ask(connection, REUSE, run_ids)
    columns = (
        words("stage", "stage"), Column("uses", "uses"), Column("computed", "computed"),
        Column("reused", "found in the store"),
        Column("seconds_spent", "seconds spent", digits(0)), Column("seconds_saved", "seconds saved", digits(0)),
    )  # fmt: skip
    spent, saved = (sum(row[name] for row in rows) for name in ("seconds_spent", "seconds_saved"))
    lead = f"{spent:,.0f} seconds of computing; what was found in the store saved {saved:,.0f}."
    return Section(
        "reuse", "What was reused", lead, columns, rows, open=True, missing=None if rows else "Nothing is done yet."
    )


def runs(connection: Any, run_ids: list[str], missing: int) -> Section:
    rows = ask(connection, RUNS, run_ids)
    for row in rows:
        row["started_at"], row["finished_at"] = (
            None if row[name] is None else f"{row[name]:%Y-%m-%d %H:%M:%S}" for name in ("started_at", "finished_at")
        )
    columns = (
        words("run_id", "run"), words("status", "status"), words("model", "model"), words("criterion", "criterion"),
        Column("ratio", "ratio"), words("started_at", "started"), words("finished_at", "finished"),
        words("error", "error"),
    )  # fmt: skip
    lead = f"{missing} of the sweep's runs have not been made yet." if missing else ""
    return Section("runs", "Runs", lead, columns, rows, missing=None if rows else "No run has been made yet.")
