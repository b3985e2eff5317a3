"""The command line run for real, on a tiny model."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path

import pytest

from storage.locks import holder

RECOVER = "examples = 8, prose = 0, own = 0, batch_size = 4, micro_batch_size = 4, rank = 4, group_size = 16"
KILLER, HURRIED, FORKED = (str(Path(__file__).parent / name) for name in ("kill.py", "hurried.py", "forked.py"))
ONE = threading.Lock()  # order at a time


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


def saap(*arguments, program=("flows.cli",), environment=None):
    """Run the `saap` command in a process of its own: a new one where the libraries may read `environment`."""
    arguments = [str(argument) for argument in arguments]
    if environment is not None:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=600,
        )
    command = Command(arguments, program)
    output, errors = command.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, command.returncode, output, errors)


class Command:
    """`saap` at work beside us, used like a subprocess.Popen, in a process that has the libraries already."""

    def __init__(self, arguments, program=("flows.cli",), environment=None, merged=False):
        self.returncode = None
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors, self._status = (
            Path(self._folder.name, name) for name in ("out", "error", "status")
        )
        order = {
            "program": [*program, *map(str, arguments)],
            "environment": dict(os.environ if environment is None else environment),
            "folder": os.getcwd(),
            "output": str(self._output),
            "errors": str(self._output if merged else self._errors),
            "status": str(self._status),
        }
        with ONE:
            fork = _forks()
            print(json.dumps(order), file=fork.stdin, flush=True)
            self.pid = int(fork.stdout.readline())

    def poll(self):
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def communicate(self, timeout):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("saap", timeout)
            time.sleep(0.02)
        return [file.read_text() if file.exists() else "" for file in (self._output, self._errors)]

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@lru_cache(maxsize=1)
def _forks():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, FORKED], **pipes)


def without_server():
    """The environment of someone who has no Prefect server: each run brings its own."""
    return {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}


def ask(store, query):
    """Rows of a query, through `saap sql --csv`."""
    done = saap("sql", query, "--store", store, "--csv")
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


def at_work_in(store, stage):
    """The process that holds the lock of an artifact of this stage, once it writes it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for draft in store.glob(f"{stage}/.draft-*"):
            key = draft.name.removeprefix(".draft-").rpartition("-")[0]
            if found := re.match(r"process (\d+) ", holder(store / "locks" / f"{stage}-{key}.lock")):
                return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"nobody is at work in {stage}")
