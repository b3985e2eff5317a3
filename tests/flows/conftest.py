"""The command line run for real, on a tiny model."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECOVER = "examples = 8, prose = 0, own = 0, batch_size = 4, micro_batch_size = 4, rank = 4, group_size = 16"
KILLER = Path(__file__).parent / "kill.py"


@pytest.fixture
def config(tmp_path, tiny_folder):
    """A run of every stage that takes seconds: tiny model, mini pack, two benchmarks."""
    file = tmp_path / "tiny.toml"
    file.write_text(f"""
name = "tiny"
store = "{tmp_path / "store"}"
model.path = "{tiny_folder}"
calibrate = {{ count = 4, length = 16 }}
prune = {{ ratio = 0.2, align = 8, protect = [0, -1] }}
recover = {{ {RECOVER}, distill = 0.5 }}
evaluate = {{ benchmarks = ["arc_easy", "wikitext2"], limit = 4, windows = [32], max_tokens = 512 }}
speed = {{ prompt_tokens = 8, new_tokens = 4, runs = 2, warmup = 1 }}
compute = {{ device = "cpu", threads = 1 }}
""")
    return file


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def saap(*arguments, killed_in=None, environment=None):
    """Run the `saap` command in a process of its own."""
    program = [str(KILLER), killed_in] if killed_in else ["-m", "flows.cli"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=600,
    )


def ask(store, query):
    """Rows of a query, through `saap sql --csv`."""
    done = saap("sql", query, "--store", store, "--csv")
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))
