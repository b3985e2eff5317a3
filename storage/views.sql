-- The warehouse's views. After a change here, raise VERSION in warehouse.py: existing files are then rebuilt.

create view leaderboard as
with scores as (
    select run_id, variant,
        case when count(*) filter (metric <> 'perplexity') = 7
             then avg(value) filter (metric <> 'perplexity') end as average,
        max(value) filter (benchmark = 'wikitext2') as wikitext2,
        max(value) filter (benchmark = 'ptb') as ptb
    from metrics where papers group by run_id, variant)
select r.run_id, r.name, r.model, r.data, r.ratio, s.variant, s.average, s.wikitext2, s.ptb,
    v.parameters, v.weight_bytes, v.tokens_per_s, v.decode_ratio, r.started_at
from scores s join runs r using (run_id) left join speed v on v.run_id = s.run_id and v.variant = s.variant
order by s.average desc nulls last;

create view comparison as
select run_id, benchmark, metric, protocol, papers,
    max(value) filter (variant = 'dense') as dense,
    max(value) filter (variant = 'pruned') as pruned,
    max(value) filter (variant = 'recovered') as recovered,
    max(stderr) filter (variant = 'dense') as dense_stderr, max(n) as n
from metrics group by all order by run_id, benchmark, metric, protocol;

create view stage_reuse as
select stage, count(*) as uses, count(*) filter (not cached) as computed, count(*) filter (cached) as reused,
    sum(seconds) filter (not cached) as seconds_spent, sum(seconds) filter (cached) as seconds_saved
from stage_runs group by stage order by seconds_saved desc nulls last;
