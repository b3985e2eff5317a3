"""The page of a run in a real browser: it shows what the warehouse says, asks for nothing, and takes any name."""

import csv
import io

import numpy as np
import pytest

from flows.pages.render import _library
from flows.pages.write import report_file, write_report
from storage.errors import StorageError
from storage.keys import digest
from tests.flows.pages.conftest import HALF, HOSTILE, MODEL, RUN, rows_in
from tests.flows.pages.made import CHANNELS, HEADS, LAYERS, Maker
from tests.storage.test_warehouse import ask


def test_it_opens_without_an_error_or_a_request_and_holds_everything(run_store, look):
    seen = look(run_store[1])
    assert (seen.said, seen.asked) == ([], [])
    assert run_store[1].stat().st_size < 5e6
    charts = seen.page.locator(".chart").count()
    assert charts == seen.page.locator(".chart svg.marks").count() == 11
    for figure in seen.page.locator("section:has(.chart)").all():
        assert figure.locator("table").count() == figure.locator("button.csv").count() == 1


def test_the_charting_library_is_made_once_and_a_damaged_copy_is_not_taken(tmp_path):
    made = _library.__wrapped__(tmp_path)
    (kept,) = (tmp_path / "pages").iterdir()
    changed = kept.stat().st_mtime_ns
    assert _library.__wrapped__(tmp_path) == made
    assert kept.stat().st_mtime_ns == changed
    kept.write_text(made[: len(made) // 2])
    assert _library.__wrapped__(tmp_path) == made == kept.read_text()


def test_the_browser_itself_would_refuse_a_request(run_store, look):
    seen = look(run_store[1])
    refused = seen.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in line for line in seen.said)


def test_names_with_tags_and_quotes_and_long_paths_are_text(run_store, look):
    seen = look(run_store[1])
    assert seen.page.title() == seen.page.locator("h1").text_content() == f"{HOSTILE}: {MODEL}"
    assert seen.page.locator("h1 b, h1 i, header script").count() == 0
    assert MODEL in seen.page.locator(".sentence").first.text_content()
    for width in (1100, 390):
        seen.page.set_viewport_size({"width": width, "height": 800})
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


QUERIES = {
    "scores": (
        ("variant", "benchmark", "value", "stderr", "n"),
        "select variant, benchmark, value, stderr, n from metrics where run_id = ? and papers",
    ),
    "sizes": (
        ("variant", "parameters", "weight_bytes", "tokens_per_s", "decode_ratio", "wikitext2"),
        "select variant, parameters, weight_bytes, tokens_per_s, decode_ratio, value from speed "
        "join metrics using (run_id, variant) where run_id = ? and benchmark = 'wikitext2' and papers",
    ),
    "kept": (("layer", "kind", "units", "kept"), "select layer, kind, units, kept from widths where run_id = ?"),
    "losses": (
        ("step", "loss", "held_out_loss", "learning_rate"),
        "select step, loss, held_out_loss, learning_rate from training where run_id = ?",
    ),
    "steps": (
        ("position", "stage", "variant", "cached", "seconds"),
        "select position, stage, variant, cached, seconds from stage_runs where run_id = ?",
    ),
}


@pytest.mark.parametrize("section", QUERIES)
def test_every_figure_is_the_answer_of_sql(section, run_store):
    from flows.pages.run_page import NAMES

    names, query = QUERIES[section]
    answer = ask(run_store[0], query, RUN)
    if section == "scores":
        answer = [(variant, NAMES[benchmark], *rest) for variant, benchmark, *rest in answer]
    shown = [tuple(row[name] for name in names) for row in rows_in(run_store[1], section)]
    assert sorted(map(str, shown)) == sorted(map(str, answer))


def test_the_table_shows_its_rows_rounded(run_store, look):
    seen = look(run_store[1])
    table = seen.page.locator("#sizes tbody tr")
    for line, row in zip(table.all(), rows_in(run_store[1], "sizes"), strict=True):
        cells = [text.replace(",", "") for text in line.locator("td").all_text_contents()]
        assert cells[0] == row["variant"]
        assert float(cells[2]) == pytest.approx(row["weight_bytes"] / 1e6, abs=0.05)
        assert float(cells[3]) == pytest.approx(row["tokens_per_s"], abs=0.05)


def test_cells_of_importance_hold_every_group_once_and_the_spread_of_theirs(run_store):
    cells = rows_in(run_store[1], "importance")
    assert sum(cell["groups"] for cell in cells) == LAYERS * (CHANNELS + HEADS)
    ((removed,),) = ask(run_store[0], "select sum(units - kept) from widths where run_id = ?", RUN)
    assert sum(cell["removed"] for cell in cells) == removed
    for cell in cells[:: len(cells) // 7]:
        where = [cell["layer"], cell["kind"], cell["unit"]]
        query = "select element, vector from importance where layer = ? and kind = ? and unit = ? and key = ?"
        samples = ask(run_store[0], query, *where, digest([RUN, "score"]))
        element, vector = np.array(samples, np.float64).T
        assert cell["element_mean"] == pytest.approx(element.mean(), rel=1e-6)
        assert cell["element_sd"] == pytest.approx(element.std(ddof=1), rel=1e-5)
        assert (cell["element_min"], cell["element_max"]) == pytest.approx((element.min(), element.max()))
        assert cell["vector_sd"] == pytest.approx(vector.std(ddof=1), rel=1e-5)
        score, below = ask(
            run_store[0],
            "select rank_score, (select count(*) from groups o where o.kind = g.kind and o.rank_score < g.rank_score) "
            "from groups g where layer = ? and kind = ? and unit = ?",
            *where,
        )[0]
        assert cell["rank_score"] == score
        if cell["groups"] == 1:
            total = LAYERS * (CHANNELS if cell["kind"] == "mlp" else HEADS)
            assert cell["percentile"] == pytest.approx(100 * below / (total - 1))


def test_hovering_a_cell_shows_the_spread_of_its_group(run_store, look):
    seen = look(run_store[1])
    chart = seen.page.locator("#importance .chart").nth(1)
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = seen.page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    assert "standard deviation" in tooltip.text_content()


def test_the_csv_is_the_table_in_full(run_store, look):
    seen = look(run_store[1])
    with seen.page.expect_download() as download:
        seen.page.locator("#kept summary").click()
        seen.page.locator("#kept button.csv").click()
    assert download.value.suggested_filename == "kept.csv"
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    answer = ask(run_store[0], "select layer, kind, units, kept, kept_parameters from widths where run_id = ?", RUN)
    columns = ("layer", "kind", "units", "kept", "kept_parameters")
    assert {tuple(row[c] for c in columns) for row in rows} == {tuple(map(str, row)) for row in answer}


def test_a_head_sorts_by_the_numbers_and_a_keyboard_is_enough(run_store, look):
    seen = look(run_store[1])
    summary = seen.page.locator("#losses summary")
    summary.focus()
    seen.page.keyboard.press("Enter")
    head = seen.page.locator("#losses th").nth(3)  # held-out loss, most of them not known
    column = seen.page.locator("#losses tbody td:nth-child(4)")
    known = sorted(row["held_out_loss"] for row in rows_in(run_store[1], "losses") if row["held_out_loss"] is not None)
    for expected, state in ((known, "ascending"), (known[::-1], "descending")):
        head.locator("button").focus()
        seen.page.keyboard.press("Enter")
        texts = column.all_text_contents()
        assert head.get_attribute("aria-sort") == state
        assert texts[: len(known)] == [f"{value:.4f}" for value in expected]
        assert set(texts[len(known) :]) == {"–"}


def test_what_is_not_there_yet_says_so(run_store, look):
    seen = look(run_store[2])
    assert seen.said == []
    missing = {
        line.locator("xpath=..").get_attribute("id"): line.text_content()
        for line in seen.page.locator(".missing").all()
    }
    assert "not been reached yet" in missing["kept"]
    assert "asks for no recovery" in missing["losses"]
    assert {"sizes", "importance"} <= set(missing)
    assert seen.page.locator("#scores tbody tr").count() == 9


def test_the_configuration_shows_what_differs_from_the_defaults(run_store):
    shown = {row["field"]: (row["value"], row["default"]) for row in rows_in(run_store[1], "config")}
    assert shown.pop("prune.ratio") == ("0.3", "0.2")
    assert shown.pop("recover.epochs") == ("2.0", "1.0")
    assert set(shown) == {"name", "model.path"}


def test_it_follows_the_dark_and_the_paper(run_store, look):
    light, dark = (look(run_store[1], color_scheme=scheme).page for scheme in ("light", "dark"))
    paint = "getComputedStyle(document.querySelector('#sizes svg .mark-text text')).fill"
    page = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(paint) != dark.evaluate(paint)
    assert light.evaluate(page) != dark.evaluate(page)
    assert dark.pdf().startswith(b"%PDF")
    dark.emulate_media(media="print")
    assert dark.evaluate(page) == light.evaluate(page)


def test_on_a_phone_nothing_sticks_out(run_store, look):
    seen = look(run_store[1])
    seen.page.set_viewport_size({"width": 390, "height": 800})
    seen.page.wait_for_timeout(300)  # the charts follow
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_run_that_is_not_there_is_one_line(run_store, tmp_path):
    root = run_store[0].root
    with pytest.raises(StorageError, match="no run nothing"):
        write_report(root, "nothing")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(root, HALF, tmp_path / "none" / "x.html")


def test_a_page_that_cannot_be_written_leaves_those_of_the_other_runs(tmp_path):
    from prefect.logging import disable_run_logger

    from flows.at_work import _tell

    maker, runs = Maker(tmp_path / "store"), ["r1", "r2", "r3"]
    for run_id in runs:
        maker.run(run_id, stages=())
    report_file(maker.store.root, "r2").mkdir()
    with disable_run_logger():
        _tell(maker.warehouse, runs)
    assert [report_file(maker.store.root, run_id).is_file() for run_id in runs] == [True, False, True]
