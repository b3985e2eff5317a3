-- The views of the warehouse. After a change here, raise VERSION in database.py: existing files are then rebuilt.
-- The last bits of a sum depend on its order, and DuckDB's threads come in any: `order by` inside an aggregate settles it.

-- one row a run and variant that was measured: the papers' metric of each benchmark, and the average of the accuracies
-- only when all seven are there
create view results as
with scores as (
    select run_id, variant,
        case when count(*) filter (papers and metric <> 'perplexity') = 7
             then avg(value) filter (papers and metric <> 'perplexity') end as average,
        max(value) filter (papers and benchmark = 'wikitext2') as wikitext2,
        max(value) filter (papers and benchmark = 'ptb') as ptb,
        max(value) filter (papers and benchmark = 'arc_easy') as arc_easy,
        max(value) filter (papers and benchmark = 'arc_challenge') as arc_challenge,
        max(value) filter (papers and benchmark = 'boolq') as boolq,
        max(value) filter (papers and benchmark = 'hellaswag') as hellaswag,
        max(value) filter (papers and benchmark = 'piqa') as piqa,
        max(value) filter (papers and benchmark = 'winogrande') as winogrande,
        max(value) filter (papers and benchmark = 'openbookqa') as openbookqa
    from metrics group by run_id, variant)
select r.run_id, r.name, r.model, r.data, r.criterion, r.ratio, s.variant, s.average, s.wikitext2, s.ptb,
    s.arc_easy, s.arc_challenge, s.boolq, s.hellaswag, s.piqa, s.winogrande, s.openbookqa,
    v.parameters, v.active_parameters, v.weight_bytes, v.tokens_per_s, v.decode_ratio, r.started_at
from scores s join runs r using (run_id) left join speed v on v.run_id = s.run_id and v.variant = s.variant;

-- One row a different result, best first: runs that found the same artifacts count once, under the newest of them, and a
-- run that has got only as far as a part of another's benchmarks does not count. A dense model has no criterion or ratio.
create view leaderboard as
with found as (
    select run_id, variant, list_sort(list(distinct key)) as keys from metrics group by run_id, variant),
newest as (
    select keys, variant, max_by(run_id, (started_at, run_id)) as run_id, count(*) as runs,
        max_by(v.run_id, (started_at, run_id)) filter (v.run_id is not null) as timed
    from found f join runs using (run_id) left join speed v using (run_id, variant) group by keys, variant),
whole as (
    select * from newest n where not exists (
        from newest o where len(o.keys) > len(n.keys) and o.variant = n.variant and list_has_all(o.keys, n.keys)))
select run_id, started_at, name, model, data, if(variant = 'dense', null, criterion) as criterion,
    if(variant = 'dense', null, ratio) as ratio, variant, average, wikitext2, ptb,
    v.parameters, v.weight_bytes, v.tokens_per_s, v.decode_ratio, w.runs
from whole w join results r using (run_id, variant) left join speed v on v.run_id = w.timed and v.variant = r.variant
order by average desc nulls last, wikitext2 nulls last, started_at desc;

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
from stage_runs where skipped is null group by stage order by seconds_saved desc nulls last;

-- One row a run and variant: what was found, and the settings that sweeps vary. settings is the whole configuration
-- without what leaves the result alone and without the seed: runs that agree in it differ in their calibration sample.
create view ablations as
with cost as (
    select run_id, sum(seconds) as seconds_to_rank from stage_runs
    where stage in ('own_text', 'score', 'gradients', 'activations', 'fisher', 'fuse', 'fluctuation', 'rank') group by run_id)
select l.run_id, l.name, l.model, l.data, l.criterion, r.config->>'$.criterion.variant' as criterion_variant, l.ratio,
    l.variant, l.average, l.wikitext2, l.ptb, l.arc_easy, l.arc_challenge, l.boolq, l.hellaswag, l.piqa, l.winogrande,
    l.openbookqa, l.parameters, l.weight_bytes, l.tokens_per_s, c.seconds_to_rank,
    r.config->>'$.fuse.fusion' as fusion, r.config->>'$.fluctuation.fluctuation' as fluctuation,
    r.config->>'$.fluctuation.asi_scope' as asi_scope, r.config->>'$.prune.direction' as direction,
    r.config->>'$.prune.search' as search, r.config->>'$.prune.kinds' as kinds,
    r.config->>'$.prune.compensation' as compensation, r.config->>'$.recover.recipe' as recipe,
    try_cast(r.config->>'$.calibrate.count' as bigint) as samples,
    try_cast(r.config->>'$.calibrate.seed' as bigint) as seed,
    json_merge_patch(r.config, '{"name": null, "store": null, "store_remote": null, "compute": null, "execute": null,
        "recover": {"micro_batch_size": null, "gradient_checkpointing": null}, "calibrate": {"seed": null}}') as settings
from results l join runs r using (run_id) left join cost c using (run_id);

-- the same, over the seeds: mean and sample standard deviation of each number; a run made twice counts once
create view criteria as
with once as (
    select distinct on (settings, variant, seed) * from ablations where variant <> 'dense'
    order by settings, variant, seed, run_id desc)
select model, data, criterion, criterion_variant, ratio, variant, count(*) as seeds,
    avg(wikitext2 order by seed) as wikitext2, stddev_samp(wikitext2 order by seed) as wikitext2_spread,
    avg(ptb order by seed) as ptb, stddev_samp(ptb order by seed) as ptb_spread,
    avg(average order by seed) as average, stddev_samp(average order by seed) as average_spread,
    avg(parameters order by seed) as parameters, avg(weight_bytes order by seed) as weight_bytes,
    avg(tokens_per_s order by seed) as tokens_per_s,
    stddev_samp(tokens_per_s order by seed) as tokens_per_s_spread,
    avg(seconds_to_rank order by seed) as seconds_to_rank,
    fusion, fluctuation, asi_scope, direction, search, kinds, compensation, recipe, samples, settings
from once group by all order by model, data, ratio, variant, wikitext2;

-- what the papers' tables call a setting (published_results.method)
create view published_names as
select * from (values
    ('criterion', 'saap', 'saap'), ('criterion', 'llm_pruner', 'llm_pruner'), ('criterion', 'wanda_sp', 'wanda_sp'),
    ('criterion', 'loraprune', 'loraprune'), ('criterion', 'lorashear', 'lorashear'),
    ('fusion', 'vector', 'saap/fusion=separate'), ('fusion', 'element', 'saap/fusion=separate'),
    ('fusion', 'weighted', 'saap/fusion=weighted'), ('fusion', 'adaptive', 'saap/fusion=adaptive'),
    ('fluctuation', 'mean', 'saap/without_asi'), ('fluctuation', 'var_weight', 'saap/with_asi'),
    ('recipe', 'lora', 'saap/lora'), ('recipe', 'qlora', 'saap/qlora'), ('recipe', 'groupwise', 'saap/groupwise')
) as names(setting, value, method);

-- the same beside the paper's LLaMA-7B, which is for the eye only unless the model is that one; accuracies in percent.
-- Its tables X and XI are of recovered models: they stand beside our pruned ones too, and tuned says so.
create view criteria_published as
with ours as (
    select *, unnest(['wikitext2', 'ptb', 'average', 'parameters', 'weight_bytes', 'tokens_per_s']) as benchmark,
        unnest([wikitext2, ptb, 100 * average, parameters, weight_bytes, tokens_per_s]) as ours,
        unnest([wikitext2_spread, ptb_spread, 100 * average_spread, null, null, tokens_per_s_spread]) as ours_spread
    from criteria),
theirs as (
    select * replace (if(benchmark = 'memory_mib', 'weight_bytes', benchmark) as benchmark,
        if(benchmark = 'memory_mib', value * 1048576, value) as value) from published_results)
select o.model, o.data, o.criterion, o.ratio, o.variant, o.fusion, o.fluctuation, o.recipe, o.samples, o.seeds,
    o.benchmark, o.ours, o.ours_spread, p.value as published, p.method, p."table", p.tuned, p.misprint, n.setting,
    o.settings
from ours o join published_names n
    on n.setting = 'criterion' and n.value = o.criterion or o.criterion = 'saap'
        and (n.setting, n.value) in (('fusion', o.fusion), ('fluctuation', o.fluctuation), ('recipe', o.recipe))
join theirs p
    on p.model = 'llama-7b' and p."table" in ('I', 'X', 'XI', 'XII') and p.benchmark = o.benchmark
    and p.method = n.method and abs(p.ratio - o.ratio) < 0.005
    and (p.tuned = (o.variant = 'recovered') or p."table" in ('X', 'XI'))
where o.ours is not null order by o.benchmark, o.ratio, p."table", p.method, o.ours;

-- The published tables' name of a model given as a folder or hub id; null for a model they do not have. Chat models and
-- Vicuna 1.5 (a LLaMA-2) are other models than those of the tables.
create macro published_model(path) as (
    with folder as (select lower(regexp_extract(rtrim(path, '/'), '[^/]+$')) as name)
    select case
        when regexp_full_match(name, 'llama-(7|13|30|33|65)b(-hf)?')
            then replace('llama-' || regexp_extract(name, '[0-9]+b'), '-30b', '-33b')
        when regexp_full_match(name, '(meta-)?llama-?2-(7|13)b(-hf)?') then 'llama2-' || regexp_extract(name, '[0-9]+b')
        when regexp_full_match(name, '(meta-)?llama-?3-8b(-hf)?') then 'llama3-8b'
        when regexp_full_match(name, 'vicuna-(7|13)b(-v(0|1\.1|1\.3))?') then 'vicuna-' || regexp_extract(name, '[0-9]+b')
    end from folder);

-- a run's numbers beside every published row of the same model, ratio and tuning; accuracies in percent, as printed
create view versus_published as
with ours as (
    select run_id, variant, benchmark, value * if(metric = 'perplexity', 1, 100) as value,
        stderr * if(metric = 'perplexity', 1, 100) as stderr, n, protocol, data
    from metrics where papers
    union all by name
    select run_id, variant, 'average' as benchmark, average * 100 as value from results where average is not null
    union all by name
    select run_id, variant, unnest(['parameters', 'memory_mib', 'tokens_per_s']) as benchmark,
        unnest([parameters::double, weight_bytes / 1048576, tokens_per_s]) as value
    from speed)
select r.run_id, p.model, p.ratio, o.variant, o.benchmark, o.value, o.stderr, o.n, o.protocol, o.data,
    p.method, p.value as published, o.value - p.value as difference, p.source, p."table", p.misprint, p.note
from ours o join runs r using (run_id) join published_results p
    on p.model = published_model(r.model) and p.benchmark = o.benchmark
    and abs(p.ratio - if(o.variant = 'dense', 0, r.ratio)) < 0.005
    and p.tuned is not distinct from case o.variant when 'pruned' then false when 'recovered' then true end
order by r.run_id, o.variant, o.benchmark, p.method;

-- One row a recovered model, its pruned one beside it: what the recipe gave back and what it took. gap_closed is the
-- share of ln(pruned/dense) of the WikiText-2 perplexity that is gone.
create view recovery as
with steps as (
    select run_id, count(*) as steps, median(tokens_per_s) as training_tokens_per_s, max_by(loss, step) as last_loss,
        min(held_out_loss) as held_out_loss
    from training group by run_id),
took as (select run_id, sum(seconds) as seconds from stage_runs where stage = 'recover' group by run_id)
select l.run_id, l.name, l.model, l.data, l.criterion, l.ratio, r.config->>'$.recover.recipe' as recipe,
    try_cast(r.config->>'$.recover.distill' as double) as distill,
    try_cast(r.config->>'$.recover.seed' as bigint) as seed,
    s.steps, t.seconds, s.training_tokens_per_s, s.last_loss, s.held_out_loss,
    p.average as pruned_average, l.average, p.wikitext2 as pruned_wikitext2, l.wikitext2, p.ptb as pruned_ptb, l.ptb,
    ln(p.wikitext2 / l.wikitext2) / ln(p.wikitext2 / d.wikitext2) as gap_closed,
    ln(p.ptb / l.ptb) / ln(p.ptb / d.ptb) as gap_closed_ptb,
    l.parameters, l.weight_bytes, l.tokens_per_s, l.decode_ratio
from results l join runs r using (run_id) join steps s using (run_id) join took t using (run_id)
    left join results p on p.run_id = l.run_id and p.variant = 'pruned'
    left join results d on d.run_id = l.run_id and d.variant = 'dense'
where l.variant = 'recovered' order by l.model, l.ratio, recipe, seed, l.started_at;

-- Exact two-sided McNemar test: of the n items that only one side has right, `few` fall to the side with fewer.
create macro mcnemar(few, n) as least(1, 2 * list_sum(list_transform(
    range(0, few::bigint + 1), lambda k: exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * ln(2)))));

-- two-sided tail of the normal distribution: erfc(|z|/√2) by Abramowitz and Stegun 7.1.26, within 1.5e-7
create macro erfc_series(x, t) as t * exp(-x * x) * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))));
create macro normal_p(z) as erfc_series(abs(z) / sqrt(2), 1 / (1 + 0.3275911 * abs(z) / sqrt(2)));

-- the error of a difference of two independent numbers
create macro joint_error(a, b) as sqrt(a * a + b * b);

-- how far a number moves with the calibration sample: over the runs that agree in all but the seed
create view seed_spread as
with once as (
    select distinct on (a.settings, m.variant, m.benchmark, m.metric, m.protocol, m.data, a.seed)
        a.settings, m.variant, m.benchmark, m.metric, m.protocol, m.data, a.seed, m.value
    from metrics m join ablations a using (run_id, variant)
    order by a.settings, m.variant, m.benchmark, m.metric, m.protocol, m.data, a.seed, run_id desc)
select settings, variant, benchmark, metric, protocol, data, count(*) as seeds, avg(value order by seed) as mean,
    stddev_samp(if(metric = 'perplexity', ln(value), value) order by seed) as spread
from once group by all;

-- Whether b differs from a by more than noise: every two variants of any runs, on the same benchmark, data and protocol.
-- difference is b − a, of perplexities the difference of their logarithms. stderr is that of the paired bootstrap over
-- items in the limit of many draws, which for a mean has a closed form: the population deviation of the items'
-- differences over √n; without items it is made of the two standard errors. low and high bound 95 %.
create view significance as
with sides as (
    select m.*, s.seeds, s.spread from metrics m
        left join (select run_id, variant, settings from ablations) using (run_id, variant)
        left join seed_spread s using (settings, variant, benchmark, metric, protocol, data)),
pairs as (
    select a.run_id as run_a, a.variant as variant_a, b.run_id as run_b, b.variant as variant_b, a.benchmark, a.metric,
        a.protocol, a.data, a.papers, a.n, a.key as key_a, b.key as key_b, a.value as value_a, b.value as value_b,
        if(a.metric = 'perplexity', ln(b.value / a.value), b.value - a.value) as difference,
        if(a.metric = 'perplexity', joint_error(a.stderr / a.value, b.stderr / b.value), joint_error(a.stderr, b.stderr)) as unpaired,
        if(a.seeds > 1 and b.seeds > 1, joint_error(a.spread, b.spread), null) as seed_spread
    from sides a join sides b using (benchmark, metric, protocol, data, n) where a.key <> b.key),
paired as (
    select p.*, stddev_pop(ib.value - ia.value order by ia.item) as deviation,
        count(*) filter (ib.value > ia.value) as won, count(*) filter (ib.value < ia.value) as lost, count(ib.value) as items
    from pairs p
        left join items ia on ia.key = p.key_a and ia.benchmark = p.benchmark and ia.metric = p.metric
            and ia.protocol = p.protocol
        left join items ib on ib.key = p.key_b and ib.benchmark = p.benchmark and ib.metric = p.metric
            and ib.protocol = p.protocol and ib.item = ia.item
    group by all),
tested as (
    select *, items = n as has_items, if(items = n, deviation / sqrt(n), unpaired) as stderr from paired)
select run_a, variant_a, run_b, variant_b, benchmark, metric, protocol, data, papers, n, value_a, value_b, difference,
    if(has_items, 'paired items', 'standard errors') as basis, stderr,
    difference - 1.96 * stderr as low, difference + 1.96 * stderr as high,
    case when has_items and metric <> 'perplexity' then mcnemar(least(won, lost), won + lost)
         else normal_p(difference / nullif(stderr, 0)) end as p_value,
    seed_spread, p_value < 0.05 and (seed_spread is null or abs(difference) > 2 * seed_spread) as more_than_noise
from tested;
