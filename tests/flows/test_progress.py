"""A real run on the screen: one line a stage, no log lines of Prefect unless asked for."""

import io
import logging
import re

import pytest

from flows.progress import StageLines
from tests.flows.conftest import saap

STAGES = ["calibrate", "score", "fuse", "fluctuation", "prune", "recover", "evaluate dense", "evaluate pruned"]
STAGES += ["evaluate recovered", "speed"]
LINE = re.compile(r"\[ ?(\d+)/13\] +\d+ s  ([a-z]+(?: (?:dense|pruned|recovered))?) ")


@pytest.mark.slow
def test_a_run_prints_a_line_a_stage_and_all_of_prefect_where_asked(config, prefect_server):
    done = saap("run", config)
    assert done.returncode == 0, done.stderr
    found = LINE.findall(done.stderr)
    assert [stage for _, stage in found] == STAGES
    assert [int(number) for number, _ in found] == [1, 2, 3, 4, 5, 6, 8, 10, 12, 13]
    assert "Finished in state" not in done.stderr
    assert not re.search(r"\r|%\||it/s", done.stderr)  # nobody's progress bars in a pipe
    assert "page: " in done.stdout
    assert "Finished in state" in saap("run", config, "-v").stderr


def record(message, *values, level=logging.INFO, seconds=None):
    made = logging.LogRecord("prefect.flow_runs", level, "", 0, message, values, None)
    if seconds is not None:
        made.seconds = seconds
    return made


def test_what_was_found_in_the_store_says_so_and_quiet_says_nothing():
    for quiet, written in ((False, ["[ 1/3]     0 s  score               found in the store"]), (True, [])):
        out = io.StringIO()
        StageLines(out, 3, quiet).filter(record("%s: %s", "score", "found in the store", seconds=0.0))
        assert out.getvalue().splitlines() == written


def test_warnings_pass_and_long_lines_are_cut_to_100_columns():
    out = io.StringIO()
    lines = StageLines(out, 3, quiet=False)
    assert not lines.filter(record("%s: %s", "score", "x" * 300, seconds=1.0))
    assert lines.filter(record("careful", level=logging.WARNING))
    assert not lines.filter(record("Created task run"))
    (line,) = out.getvalue().splitlines()
    assert (len(line), line[-1]) == (100, "…")


def test_in_a_terminal_the_line_of_a_variant_counts_up_in_place():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    lines = StageLines(out, 2, quiet=False)
    for benchmark in ("piqa", "boolq"):
        lines.filter(record("%s: %s", f"evaluate dense {benchmark}", "acc 0.5", seconds=1.0))
    first, second = out.getvalue().split("\r\x1b[K")[1:]
    assert first.startswith("[ 1/2]")
    assert first.endswith("1 benchmark, piqa last")
    assert second.endswith("2 benchmarks, boolq last")
    lines.filter(record("Finished in state Completed()"))
    assert out.getvalue().endswith("\n")
