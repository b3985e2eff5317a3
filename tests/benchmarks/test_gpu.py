"""benchmarks/gpu.sh on a CPU, at toy sizes: whether its steps run, stop in time, and say what they missed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def run(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([BENCHMARKS / "gpu.sh", *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_every_step_runs_and_prints_its_line():
    done = run("--device", "cpu", "--tiny")
    about, *steps, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert about["torch"] == torch.__version__
    names = ["kernels", "scoring", "decode", "fisher_and_refit", "training", "whole_run"]
    assert [step["step"] for step in steps] == names == last["good"]
    found = {name: value for step in steps for name, value in step.items()}
    assert found["plain_error"] < 1e-5
    assert 0 < found["int4_error"] < 0.01
    assert found["perplexity_error_recovered"] == 0  # the CPU against itself
    assert found["perplexity_recovered"] < found["perplexity_pruned"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_is_missing_is_said_at_once():
    done = run()
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("missing here: ")


def test_a_step_is_cut_off_at_its_limit_and_one_that_dies_says_so(gpu, monkeypatch):
    def sleeps(device, tiny):
        time.sleep(30)

    def fails(device, tiny):
        raise ValueError("no such kernel")

    def dies(device, tiny):
        os._exit(7)

    monkeypatch.setattr(gpu, "STEPS", {"sleeps": (sleeps, 1), "fails": (fails, 1), "dies": (dies, 1)})
    start = time.perf_counter()
    errors = [gpu.run_step(step, "cpu", True, 1.0)["error"] for step in gpu.STEPS]
    assert time.perf_counter() - start < 20
    assert errors == ["cut off after 1 s", "ValueError: no such kernel", "the process ended with 7"]


def test_targets_that_figures_miss_or_lack_are_named(gpu):
    targets = (("ratio", ">=", 3.0), ("seconds", "<=", 2.0), ("peak", "<=", 1.0))
    assert gpu.missed_targets({"ratio": 3.1, "seconds": 2.0, "peak": 0.5}, targets) == []
    assert gpu.missed_targets({"ratio": 2.9, "seconds": 2.1}, targets) == ["ratio >= 3", "seconds <= 2", "peak <= 1"]
