"""A real run on the screen: one line a stage, no log lines of Prefect unless asked for."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

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


@pytest.mark.slow
def test_in_a_terminal_bars_count_up_and_leave_the_lines_of_the_stages_alone(config, prefect_server, tmp_path):
    """In a folder that is no git repository, as users have them."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment["TQDM_MININTERVAL"] = "0"  # a stage may be over in less than the tenth of a second of a bar
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--set", "recover.held_out=0"]
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(ours, 65536):
            screen += part
    assert running.wait(timeout=60) == 0, screen.decode()
    text = screen.decode().replace("\x1b[K", "").replace("\r\n", "\n")
    assert re.search(r"\rscore: +\d+%\|.*\d/\d+ \[\d\d:\d\d<\d\d:\d\d, +[\d.]+sample/s\]", text)
    left = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    assert [LINE.match(line) for line in left if line and not LINE.match(line)] == [], left
    assert [LINE.match(line)[2] for line in left if line] == STAGES


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(message, *values, level=logging.INFO, **more):
    made = logging.LogRecord("prefect.flow_runs", level, "", 0, message, values, None)
    vars(made).update(more)
    return made


def test_what_was_found_in_the_store_says_so_and_quiet_says_nothing():
    for quiet, written in ((False, ["[ 1/3]     0 s  score               found in the store"]), (True, [])):
        out = io.StringIO()
        StageLines(out, 3, quiet).filter(record("%s: %s", "score", "found in the store", seconds=0.0))
        assert out.getvalue().splitlines() == written


def test_warnings_pass_and_a_terminal_gets_100_columns():
    for out, length, last in ((Terminal(), 100, "…"), (io.StringIO(), 336, "x")):  # a file has no width
        lines = StageLines(out, 3, quiet=False)
        assert not lines.filter(record("%s: %s", "score", "x" * 300, seconds=1.0))
        assert lines.filter(record("careful", level=logging.WARNING))
        assert not lines.filter(record("Created task run"))
        line = out.getvalue().splitlines()[-1].rpartition("\x1b[K")[2]
        assert (len(line), line[-1]) == (length, last)


def test_steps_of_two_runs_are_two_lines_and_one_that_failed_is_said_once():
    out = io.StringIO()
    lines = StageLines(out, 9, quiet=False)
    for ratio, benchmark in (("0.2", "piqa"), ("0.2", "boolq"), ("0.3", "piqa")):
        lines.filter(record("%s: %s", f"evaluate pruned {benchmark}", "acc 0.5", seconds=1.0, its_runs=ratio))
    assert not lines.filter(record("%s failed: %s", "recover", "no memory\nat all", failed=True, its_runs="0.2"))
    for said in (
        "Finished in state Failed('no memory')",
        "Crash detected! Execution was aborted by an interrupt signal.",
        "Finished in state Crashed('Execution was aborted by an interrupt signal.')",
    ):
        assert not lines.filter(record(said, level=logging.ERROR))
    assert lines.filter(record("Crash detected! Execution was interrupted by OSError", level=logging.ERROR))
    assert out.getvalue().splitlines() == [
        "[ 2/9]     2 s  evaluate pruned     (0.2) 2 benchmarks, boolq last",
        "[ 3/9]     1 s  evaluate pruned     (0.3) 1 benchmark, piqa last",
        "[ 4/9]  failed  recover             (0.2) no memory",
    ]


def test_in_a_terminal_the_line_of_a_variant_counts_up_in_place():
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
