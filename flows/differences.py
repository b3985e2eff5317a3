"""What two runs differ in: configuration, stages, numbers. Each as (columns, rows of text)."""

import json
from typing import Any

from flows.pages.run_head import flat_fields
from flows.pages.section import ask
from flows.printing import rounded

Table = tuple[list[str], list[list[str]]]

_STAGES = """
with pairs as (
    select coalesce(a.position, b.position) as position, coalesce(a.stage, b.stage) as stage,
        coalesce(a.variant, b.variant) as variant, coalesce(a.benchmark, b.benchmark) as benchmark, a.key as key_a,
        b.key as key_b
    from (from stage_runs where run_id = ?) a full join (from stage_runs where run_id = ?) b
        on (a.stage, coalesce(a.variant, ''), coalesce(a.benchmark, ''))
         = (b.stage, coalesce(b.variant, ''), coalesce(b.benchmark, '')))
select stage, variant, count(*) as steps, count(*) filter (key_a = key_b) as same,
    count(*) filter (key_b is null) as only_a, count(*) filter (key_a is null) as only_b
from pairs group by stage, variant having same < steps order by min(position)"""
# perplexities in other windows than the papers' too: those are named
_NUMBERS = r"""
with shown as (
    select *, if(papers, null, try_cast(regexp_extract(protocol, 'windows of (\d+)', 1) as integer)) as length
    from metrics where papers or metric = 'perplexity')
select coalesce(a.variant, b.variant) as variant,
    coalesce(a.benchmark, b.benchmark) || coalesce(' @' || coalesce(a.length, b.length), '') as benchmark,
    a.value as value_a, b.value as value_b, s.more_than_noise, coalesce(a.metric, b.metric) as metric
from (from shown where run_id = $a) a full join (from shown where run_id = $b) b
        on (a.variant, a.benchmark, a.metric, a.protocol) = (b.variant, b.benchmark, b.metric, b.protocol)
    left join (from significance where run_a = $a and run_b = $b) s
        on (s.variant_a, s.variant_b, s.benchmark, s.metric, s.protocol)
         = (a.variant, a.variant, a.benchmark, a.metric, a.protocol)
where a.value is distinct from b.value
order by list_position(['dense', 'pruned', 'recovered'], coalesce(a.variant, b.variant)),
    coalesce(a.metric, b.metric) = 'perplexity', coalesce(a.benchmark, b.benchmark),
    coalesce(a.length, b.length) nulls first"""
_SPEEDS = """
with sides as (select *, nullif(active_parameters, parameters) as active from speed)
select variant, unnest(['parameters', 'active parameters', 'weight_bytes', 'tokens_per_s']) as what,
    unnest([a.parameters::double, a.active, a.weight_bytes, a.tokens_per_s]) as value_a,
    unnest([b.parameters::double, b.active, b.weight_bytes, b.tokens_per_s]) as value_b
from (from sides where run_id = ?) a join (from sides where run_id = ?) b using (variant)
order by list_position(['dense', 'pruned', 'recovered'], variant), what"""


def configuration(connection: Any, a: str, b: str) -> Table:
    """The fields that are not the same."""
    texts = dict(connection.execute("select run_id, config from runs where run_id in (?, ?)", [a, b]).fetchall())
    left, right = (flat_fields(json.loads(texts[run_id])) for run_id in (a, b))
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    rows = [[name, json.dumps(left.get(name)), json.dumps(right.get(name))] for name in names]
    return ["field", a, b], rows


def stages(connection: Any, a: str, b: str) -> Table:
    """The stages that do not have all their artifacts in common."""
    rows = []
    for row in ask(connection, _STAGES, a, b):
        name = " ".join(filter(None, (row["stage"], row["variant"])))
        only = [f"{row[side]} only in {run_id}" for side, run_id in (("only_a", a), ("only_b", b)) if row[side]]
        rows.append([name, f"{row['same']} of {row['steps']} steps", ", ".join(only)])
    return ["stage", "in common", ""], rows


def numbers(connection: Any, a: str, b: str) -> Table:
    """The metrics and sizes that are not the same; accuracies in percent."""
    result = connection.execute(_NUMBERS, {"a": a, "b": b})
    rows = []
    for variant, benchmark, *values, noise, metric in result.fetchall():
        scale = 1 if metric == "perplexity" else 100
        left, right = (None if value is None else value * scale for value in values)
        verdict = "" if noise is None else "more than noise" if noise else "within noise"
        rows.append([variant, benchmark, rounded(left), rounded(right), verdict])
    sizes = [row for row in ask(connection, _SPEEDS, a, b) if row["value_a"] != row["value_b"]]
    rows += [[row["variant"], row["what"], rounded(row["value_a"]), rounded(row["value_b"]), ""] for row in sizes]
    return ["variant", "", a, b, ""], rows
