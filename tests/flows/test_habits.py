"""What a shell, an editor and a hurried person expect of the command."""

import html
import io
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from flows import printing
from storage.keys import digest
from tests.flows.conftest import saap
from tests.flows.pages.made import Maker
from tests.flows.test_cli import refused
from tests.storage.test_warehouse import ask

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
FIRST, SECOND = "20261127T120000-0aa001", "20261127T130000-0bb002"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two runs that differ in the ratio."""
    maker = Maker(tmp_path_factory.mktemp("habits"))
    for run_id, ratio in ((FIRST, 0.2), (SECOND, 0.5)):
        maker.run(run_id, {"prune": {"ratio": ratio}}, stages=("prune", "speed"))
    maker.warehouse.rebuild()
    return maker.store.root


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [("saap re", 1, {"report", "rebuild"})]
    + [(f"saap {command} 20261127T12", len(command.split()) + 1, {FIRST})
       for command in ("show", "diff", "push", "gc --run", "export gguf", "export hf", "export mlflow")],
)  # fmt: skip
def test_the_shell_completes_commands_and_runs(made, words, at, offered):
    asked = {"_SAAP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at), "SAAP_STORE": str(made)}
    assert set(saap(environment=asked).stdout.split()) == offered


def test_the_schema_takes_every_configuration_of_ours_and_no_wrong_field():
    schema = json.loads(saap("config", "--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for file in CONFIGS:
        jsonschema.validate(tomllib.loads(file.read_text()), schema)
    for wrong in ("prune.rato = 0.5", "prune.ratio = 1.5", 'criterion.name = "best"', 'sweep."prune.ratio" = 0.2'):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tomllib.loads(wrong), schema)


def test_show_says_what_where_and_how_to_load(made):
    done = saap("show", "0aa001", "--store", made)
    folder = made / "prune" / digest([FIRST, "prune"])
    assert done.returncode == 0, done.stderr
    for word in (
        FIRST,
        "completed",
        "smollm2-135m",
        str(folder),
        f"from_pretrained('{folder}')",
        f"saap export gguf {FIRST}",
    ):
        assert word in done.stdout


def test_a_run_can_be_named_by_its_begin_or_end_but_by_nothing_else(made):
    for named in (FIRST, "20261127T12", "0aa001"):
        assert FIRST in saap("show", named, "--store", made).stdout
    assert SECOND in saap("show", "--store", made).stdout  # the newest
    assert f"runs/{FIRST}" in saap("gc", "--run", "0aa001", "--store", made).stdout
    refused(saap("show", "20261127", "--store", made), "2 runs", FIRST, SECOND)
    refused(saap("show", "120000", "--store", made), "no such run", "saap sql")


def test_diff_shows_the_field_the_stages_and_the_numbers_that_differ(made):
    done = saap("diff", "0aa001", "0bb002", "--store", made)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["prune.ratio", "0.2", "0.5"] in lines
    assert ["prune", "0", "of", "1", "steps"] in [line[:5] for line in lines]
    assert not any(line[:2] == ["evaluate", "dense"] for line in lines)  # the same artifacts
    assert any(line[:2] == ["pruned", "wikitext2"] for line in lines)
    same = saap("diff", FIRST, FIRST, "--store", made).stdout
    assert same.count("no difference") == 3


def test_diff_names_the_windows_that_are_not_the_papers(tmp_path):
    maker = Maker(tmp_path)
    for run_id, windows in ((FIRST, (64, 128, 2048)), (SECOND, (64, 128, 512))):
        config = {"evaluate": {"windows": windows, "benchmarks": ["wikitext2", "piqa"]}}
        maker.run(run_id, config, stages=("prune",))
    maker.warehouse.rebuild()
    length, of = "regexp_extract(protocol, '[0-9]+$')::integer", "benchmark = 'wikitext2' and variant"
    query = f"select {length}, value from metrics where {of} = 'pruned' and run_id = ?"
    values = [dict(ask(maker.warehouse, query, run_id)) for run_id in (FIRST, SECOND)]
    query = f"select {length}, more_than_noise from significance where {of}_a = 'pruned' and variant_b = 'pruned'"
    noise = dict(ask(maker.warehouse, f"{query} and run_a = ? and run_b = ?", FIRST, SECOND))
    assert noise.keys() == {64, 128}
    wanted = []
    for window in (128, 64, 512, 2048):
        name = ["wikitext2"] if window == 128 else ["wikitext2", f"@{window}"]
        verdict = {None: "", True: "more than noise", False: "within noise"}[noise.get(window)]
        wanted.append(["pruned", *name, *(printing.rounded(its.get(window)) for its in values), *verdict.split()])
    printed = saap("diff", FIRST, SECOND, "--store", tmp_path).stdout.splitlines()
    assert [line.split() for line in printed if line.split()[:2] == ["pruned", "wikitext2"]] == wanted


def test_a_command_that_is_printed_to_be_copied_names_the_store(made, tmp_path):
    store = shutil.copytree(made, tmp_path / "a store")
    shown = saap("show", FIRST, "--store", store).stdout.splitlines()
    assert shlex.split(shown[-1]) == ["saap", "export", "gguf", FIRST, "model.gguf", "--store", str(store)]
    (page,) = (line for line in shown if line.startswith("page"))
    assert page.endswith(f"saap report {FIRST} --store '{store}' writes it")
    listing = ["saap", "sql", "--store", str(store), "select run_id, name, status from runs"]
    for command in ("show none", "diff none none", "gc --run none", "gc --name none", "export gguf none x"):
        done = saap(*command.split(), "--store", store)
        refused(done, "saap sql")
        assert shlex.split(done.stderr[done.stderr.index("saap sql") :]) == listing, command
    assert FIRST in saap(*listing[1:]).stdout
    assert saap("report", FIRST, "--store", store).returncode == 0
    page = (store / "runs" / FIRST / "report.html").read_text()
    assert [html.unescape(one) for one in re.findall(r"<code>(saap .*?)</code>", page)] == [
        f"saap export gguf {FIRST} model.gguf --store '{store}'",
        f"saap report {FIRST} --store '{store}' --html FILE",
    ]


def test_run_without_a_configuration_says_what_to_do():
    refused(saap("run"), "configs/demo.toml", "saap config")


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_loud_and_quiet_at_once_is_refused(config, store, command):
    refused(saap(command, config, "-v", "-q"), "--verbose", "--quiet", "choose one")
    assert not store.exists()


def test_the_help_tells_the_exit_codes():
    words = " ".join(saap("--help").stdout.split())
    for word in ("Exit codes", "0 done", "2 something to put right", "130 interrupted"):
        assert word in words


def test_the_leaderboard_fits_100_columns_rounded_and_csv_has_every_digit(made):
    lines = saap("sql", "from leaderboard", "--store", made).stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("100.0 M" in line for line in lines)
    assert not any(line.startswith("run_id") for line in lines)  # its halves above each other
    (pruned, *_) = (
        line
        for line in saap("sql", "from leaderboard", "--store", made, "--csv").stdout.splitlines()
        if "pruned" in line
    )
    assert "90000000" in pruned


def test_a_table_beyond_100_columns_is_printed_in_parts_and_nothing_is_cut(capsys):
    columns = ["variant", *(f"column {number}" for number in range(20))]
    rows = [[name, *(f"{name[0]}{number}" for number in range(20))] for name in ("dense", "pruned")]
    printing.print_table(columns, rows, title="wide")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "wide"
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:] if line.strip()] == ["variant", "dense", "pruned"] * 3
    words = " ".join(lines).split()
    for number in range(20):
        assert words.count(f"d{number}") == words.count(f"p{number}") == 1


def test_a_narrow_terminal_cuts_long_cells_and_wraps_none(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(printing, "console", Console(file=out, width=40, force_terminal=True, color_system=None))
    monkeypatch.setattr(printing.sys.stdout, "isatty", lambda: True, raising=False)
    printing.print_table(["name", "value"], [["a" * 80, 1], ["b", 2]])
    lines = [line for line in out.getvalue().splitlines() if line.strip()]
    assert len(lines) == 3
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(61.649, "61.6"), (843.7, "844"), (12345.6, "12,346"), (0.70634, "0.7063"), (0.2, "0.2"), (3.2e-7, "3.20e-07"),
     (134515008, "134,515,008"), (2026, "2026"), (None, ""), ("x", "x"), (True, "True")],
)  # fmt: skip
def test_numbers_are_rounded_for_people(value, text):
    assert printing.cell(value) == text
