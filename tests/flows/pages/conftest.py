"""A real browser, and pages opened in it with everything they log recorded."""

import json
import re
import shutil
from dataclasses import dataclass, field

import pytest

from flows.pages.write import write_report, write_sweep
from tests.flows.pages.made import Maker

HOSTILE = """</script><script>document.title = "taken"</script> "quoted" & 'single' <b>bold</b>"""
MODEL = "/models/" + 'd\'eep "er"/' * 17 + "<i>llama-7b</i>"  # 200 characters and more
RUN, HALF = "20261127T120000-0aa001", "20261127T120000-0aa002"


@pytest.fixture(scope="session")
def browser():
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium, and the pages are tested too")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def rows_in(file, section):
    """The rows behind a section's charts and table, as dicts."""
    found = re.search(
        rf'<script type="application/json" id="rows-{section}">(.*?)</script>', file.read_text(), re.DOTALL
    )
    data = json.loads(found[1])
    return [dict(zip(data["names"], row, strict=True)) for row in data["rows"]]


@dataclass
class Opened:
    """said: console lines and errors; asked: what the page requested beside itself."""

    page: object
    said: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    def drawn(self, chart, data):
        """How many items of a data set a chart has, e.g. 'layer_0_marks'."""
        return self.page.evaluate(
            "([chart, data]) => document.querySelectorAll('.chart')[chart].view.data(data).length", [chart, data]
        )


@pytest.fixture
def look(browser):
    """A function from a file to the page, opened and drawn."""
    contexts = []

    def opened(file, **options):
        context = browser.new_context(viewport={"width": 1100, "height": 900}, **options)
        contexts.append(context)
        seen = Opened(context.new_page())
        seen.page.on("console", lambda message: seen.said.append(message.text))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        seen.page.goto(file.as_uri())
        seen.page.wait_for_selector("body[data-drawn]", state="attached")
        seen.asked.remove(file.as_uri())
        return seen

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def run_store(tmp_path_factory):
    """(warehouse, page of a whole run whose names are hostile, page of a run that has only begun)."""
    maker = Maker(tmp_path_factory.mktemp("pages"))
    config = {"name": HOSTILE, "model": {"path": MODEL}, "prune": {"ratio": 0.3}, "recover": {"epochs": 2}}
    maker.run(RUN, config)
    record = maker.run(HALF, {"recover": {"recipe": "none"}}, finished=False, stages=("score",))
    maker.warehouse.rebuild()
    root = maker.store.root
    yield maker.warehouse, write_report(root, RUN), write_report(root, HALF)
    record.finish("completed")  # until here this process was the one that runs it


@pytest.fixture(scope="session")
def sweep_store(tmp_path_factory):
    """(warehouse, page) of two criteria at two ratios on two seeds, and a second model that the paper has."""
    maker = Maker(tmp_path_factory.mktemp("pages"), seed=1)
    chosen = [("small", name, ratio, seed) for name in ("saap", "flap") for ratio in (0.2, 0.5) for seed in (0, 1)]
    run_ids = []
    for number, (model, name, ratio, seed) in enumerate([*chosen, ("/models/llama-7b", "saap", 0.2, 0)]):
        config = {"name": "wide", "model": {"path": model}, "criterion": {"name": name}, "prune": {"ratio": ratio}}
        run_ids.append(f"20261127T1200{number:02d}-0bb{number:03d}")
        maker.run(run_ids[-1], config | {"calibrate": {"seed": seed}}, stages=("prune", "recover", "speed"))
    maker.warehouse.rebuild()
    root = maker.store.root
    return maker.warehouse, write_sweep(root, "wide", run_ids, root / "wide.html")
