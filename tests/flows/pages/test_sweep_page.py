"""The page of a sweep in a real browser: means and spreads are those of SQL, filters filter, the front is the front."""

import html
import re
import shlex
import statistics

import pytest

from flows.pages.write import write_sweep
from flows.targets import write_sweep_of_file
from tests.flows.conftest import saap
from tests.flows.pages.conftest import rows_in
from tests.flows.pages.made import Maker
from tests.storage.test_warehouse import ask


def test_it_opens_without_an_error_or_a_request(sweep_store, look):
    seen = look(sweep_store[1])
    assert (seen.said, seen.asked) == ([], [])
    assert seen.page.locator(".chart svg.marks").count() == 9  # three measures against three costs


def test_a_sweep_without_seeds_and_filters_that_leave_nothing_are_no_complaint(sweep_store, look, tmp_path):
    ids = [f"20261127T1200{number:02d}-0bb{number:03d}" for number in (0, 2)]
    seen = look(write_sweep(sweep_store[0].root, "once", ids, tmp_path / "once.html"))
    assert (seen.said, seen.asked) == ([], [])
    assert seen.page.locator(".chart svg.marks").count() == 9
    seen = look(sweep_store[1])
    for box in seen.page.locator(".filters input[name=model]").all():
        box.uncheck()
    seen.page.wait_for_timeout(100)
    assert seen.page.locator("#settings tbody tr:visible").count() == 0
    assert seen.said == []


def test_means_and_spreads_over_the_seeds_are_those_of_the_view(sweep_store):
    rows = [row for row in rows_in(sweep_store[1], "settings") if row["variant"] == "recovered"]
    columns = "model, criterion, ratio, seeds, wikitext2, wikitext2_spread, ptb, ptb_spread"
    answer = ask(sweep_store[0], f"select {columns}, average, average_spread from criteria where variant = 'recovered'")
    shown = {(row["model"], row["criterion"], row["ratio"]): row for row in rows}
    assert len(shown) == len(answer) == 5
    for model, criterion, ratio, seeds, *numbers, average, average_spread in answer:
        row = shown[model, criterion, ratio]
        assert row["seeds"] == seeds == (2 if model == "small" else 1)
        assert [row[n] for n in ("wikitext2", "wikitext2_spread", "ptb", "ptb_spread")] == pytest.approx(numbers)
        assert row["average"] == pytest.approx(100 * average)
        assert row["average_spread"] == pytest.approx(average_spread and 100 * average_spread)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(warehouse, page) of two seeds and three benchmarks, of a model that the paper has."""
    maker, run_ids = Maker(tmp_path_factory.mktemp("three")), ["20261127T120000-0ee000", "20261127T120001-0ee001"]
    for seed, run_id in enumerate(run_ids):
        config = {"model": {"path": "/models/llama-7b"}, "evaluate": {"benchmarks": ["wikitext2", "piqa", "boolq"]}}
        maker.run(run_id, config | {"calibrate": {"seed": seed}}, stages=("prune", "speed"))
    maker.warehouse.rebuild()
    root = maker.store.root
    return maker.warehouse, write_sweep(root, "three", run_ids, root / "three.html")


def test_a_task_has_a_column_of_its_own_where_not_all_seven_were_measured(three, sweep_store):
    warehouse, page = three
    (row,) = (row for row in rows_in(page, "settings") if row["variant"] == "pruned")
    for task in ("piqa", "boolq"):
        query = "select 100 * value from metrics where variant = 'pruned' and benchmark = ?"
        values = [value for (value,) in ask(warehouse, query, task)]
        assert len(values) == 2
        assert row[task] == pytest.approx(statistics.mean(values))
        assert row[f"{task}_spread"] == pytest.approx(statistics.stdev(values))
    heads = re.findall(r'data-name="(\w+)" class="number"><button type="button">([^<]*%)</button>', page.read_text())
    assert heads == [("boolq", "BoolQ, %"), ("piqa", "PIQA, %"), ("average", "average, %")]
    assert {ghost["benchmark"] for ghost in rows_in(page, "ghosts")} == {"wikitext2", "piqa", "boolq"}
    assert not {"piqa", "piqa_spread"} & rows_in(sweep_store[1], "settings")[0].keys()


def test_a_task_has_charts_of_its_own_where_not_all_seven_were_measured(three, look):
    seen = look(three[1])
    assert (seen.said, seen.asked) == ([], [])
    assert seen.page.locator(".chart svg.marks").count() == 9  # three measures against three costs


def test_sizes_and_speeds_are_means_over_the_runs(sweep_store):
    for row in rows_in(sweep_store[1], "settings"):
        if row["variant"] == "dense":
            continue
        where = [row["model"], row["criterion"], row["ratio"], row["variant"]]
        ((parameters, weight_bytes, rate),) = ask(
            sweep_store[0],
            "select avg(parameters), avg(weight_bytes), avg(tokens_per_s) from speed join runs using (run_id) "
            "where model = ? and criterion = ? and ratio = ? and variant = ?",
            *where,
        )
        assert (row["parameters"], row["weight_bytes"], row["tokens_per_s"]) == pytest.approx(
            (parameters, weight_bytes, rate)
        )


def front(rows, quality, cost):
    """The rows that no other of their model beats, by comparing all pairs."""
    sign = -1 if quality == "average" else 1
    dear = -1 if cost == "tokens_per_s" else 1
    return {
        (row["setting"], row["model"], row["ratio"], row["variant"])
        for row in rows
        if not any(
            other["model"] == row["model"]
            and dear * other[cost] <= dear * row[cost]
            and sign * other[quality] < sign * row[quality]
            for other in rows
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chart", "quality", "cost", "off"),
    [
        (0, "wikitext2", "parameters_m", None),
        (5, "ptb", "tokens_per_s", "recovered"),
        (7, "average", "megabytes", "pruned"),
    ],
)
def test_the_ringed_points_are_the_pareto_front_of_what_is_ticked(sweep_store, look, chart, quality, cost, off):
    seen = look(sweep_store[1])
    rows = [row for row in rows_in(sweep_store[1], "settings") if row["variant"] != off]
    if off:
        seen.page.locator(f".filters input[value={off}]").uncheck()
        seen.page.wait_for_timeout(100)
    ringed = seen.page.evaluate(
        "chart => document.querySelectorAll('.chart')[chart].view.data('layer_4_marks')"
        ".map(({ datum: d }) => [d.setting, d.model, d.ratio, d.variant])",
        chart,
    )
    assert set(map(tuple, ringed)) == front(rows, quality, cost)


def test_filters_take_away_points_and_lines_of_the_table(sweep_store, look):
    seen = look(sweep_store[1])
    rows = rows_in(sweep_store[1], "settings")
    visible = seen.page.locator("#settings tbody tr:visible")
    assert visible.count() == len(rows) == seen.drawn(0, "layer_3_marks")
    seen.page.locator(".filters input[name=ratio][value='0.5']").uncheck()
    seen.page.locator(".filters input[name=model][value=small]").uncheck()
    seen.page.wait_for_timeout(100)
    left = [row for row in rows if row["ratio"] != 0.5 and row["model"] != "small"]
    assert 0 < visible.count() == len(left) == seen.drawn(0, "layer_3_marks") < len(rows)
    seen.page.locator(".filters input[name=model][value=small]").check()
    seen.page.locator(".filters input[name=ratio][value='0.5']").check()
    seen.page.wait_for_timeout(100)
    assert visible.count() == len(rows) == seen.drawn(0, "layer_3_marks")


def test_sorting_by_perplexity_puts_the_best_first(sweep_store, look):
    seen = look(sweep_store[1])
    seen.page.get_by_role("button", name="WikiText-2", exact=True).click()
    order = [
        int(number)
        for number in seen.page.locator("#settings tbody tr").evaluate_all("all => all.map(r => r.dataset.row)")
    ]
    values = [rows_in(sweep_store[1], "settings")[number]["wikitext2"] for number in order]
    assert values == sorted(values)


def test_ghosts_are_the_papers_numbers_of_the_same_model_and_ratio(sweep_store, look):
    seen = look(sweep_store[1])
    shown = rows_in(sweep_store[1], "ghosts")
    assert {row["model"] for row in shown} == {"/models/llama-7b"}
    assert {row["ratio"] for row in shown} == {0.2}
    answer = ask(
        sweep_store[0],
        "select method, benchmark, value from published_results where model = 'llama-7b' and abs(ratio - 0.2) < 0.005 "
        "and tuned is not null and benchmark in ('wikitext2', 'ptb', 'average')",
    )
    assert {(row["published_method"], row["benchmark"], row["published"]) for row in shown} == set(answer)
    assert seen.drawn(0, "layer_0_marks") == sum(row["benchmark"] == "wikitext2" for row in shown)


def test_what_was_reused_is_counted(sweep_store):
    shown = {row["stage"]: (row["computed"], row["reused"]) for row in rows_in(sweep_store[1], "reuse")}
    answer = ask(sweep_store[0], "select stage, computed, reused from stage_reuse")
    assert shown == {stage: (computed, reused) for stage, computed, reused in answer}
    assert shown["evaluate"] == (9 * 18, 9 * 9)


def test_dense_models_that_were_measured_differently_are_rows_of_their_own(tmp_path):
    maker, run_ids = Maker(tmp_path), []
    ways = [{"max_tokens": 1024}, {"max_tokens": 8192}, {"max_tokens": 8192, "variants": ["dense", "pruned"]}]
    for number, evaluate in enumerate(ways):
        run_ids.append(f"20261127T12000{number}-0cc00{number}")
        config = {"evaluate": evaluate, "speed": {"runs": number}, "recover": {"epochs": 1 + number}}
        maker.run(run_ids[-1], config, stages=("prune", "speed"))
    maker.warehouse.rebuild()
    page = write_sweep(tmp_path, "ways", run_ids, tmp_path / "ways.html")
    dense = {row["setting"]: row["wikitext2"] for row in rows_in(page, "settings") if row["variant"] == "dense"}
    measured = ask(
        maker.warehouse, "select run_id, wikitext2 from results where variant = 'dense' order by run_id limit 2"
    )
    assert dense == {
        f"dense, evaluate.max_tokens = {way['max_tokens']}": value
        for way, (_, value) in zip(ways[:2], measured, strict=True)
    }
    assert "3 runs: 1 model, 1 ratio, 3 settings." in page.read_text()
    one = write_sweep(tmp_path, "one", run_ids[1:], tmp_path / "one.html")
    assert [row["setting"] for row in rows_in(one, "settings") if row["variant"] == "dense"] == ["dense"]


@pytest.mark.parametrize("by", ["file", "name"])
def test_the_command_in_the_footer_makes_the_page_again(tmp_path, by):
    maker = Maker(tmp_path / "store")
    file = tmp_path / "stem.toml"
    file.write_text(f'name = "another name"\nstore = "{tmp_path / "store"}"\n[sweep]\n"prune.ratio" = [0.2, 0.5]\n')
    for number, ratio in enumerate((0.2, 0.5)):
        config = {"name": "another name", "prune": {"ratio": ratio}, "model": {"path": "/a model"}}
        maker.run(f"20261127T12000{number}-0dd00{number}", config, stages=("prune",))
    page, again = tmp_path / "page.html", tmp_path / "again.html"
    if by == "file":
        write_sweep_of_file(file, ('model.path="/a model"',), page)
    else:
        saap("report", "another name", "--store", tmp_path / "store", "--html", page)
    said = html.unescape(re.search(r"<code>saap (report .*?) --html FILE</code>", page.read_text())[1])
    done = saap(*shlex.split(said), "--html", again)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "2 runs, 0 not made yet"), done.stderr
    assert again.read_text() == page.read_text()
