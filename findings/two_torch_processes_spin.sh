#!/usr/bin/env bash
# Two processes of torch that share the cores keep them from each other: a thread that waits for the others of its product
# looks 300,000 times before it sleeps. libgomp, which comes with torch for Linux, reports its waiting policy as PASSIVE
# and yet has this count; it takes 1,000 only where its own process has more threads than there are cores, and knows
# nothing of others. With GOMP_SPINCOUNT=3000 the same two processes take about twice as long as one.
set -euo pipefail
[ "$(nproc)" -ge 2 ] || { echo "needs two cores: not run"; exit 0; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy
env/bin/python - <<'PY'
import os
import re
import statistics
import subprocess
import sys
from importlib.metadata import version

WORK = """
import os, time, torch
torch.set_num_threads(os.cpu_count())
x, layers = torch.randn(8, 576), [torch.randn(1536, 576) for _ in range(30)]
def work():
    for _ in range(20):
        for w in layers:
            torch.nn.functional.silu(x @ w.t()) @ w
work()
start = time.perf_counter()
for _ in range(5):
    work()
print(time.perf_counter() - start)
"""
plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}


def at_once(processes, **setting):
    """Seconds of the slowest of so many."""
    started = [
        subprocess.Popen([sys.executable, "-c", WORK], env={**plain, **setting}, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return max(float(one.communicate()[0]) for one in started)


told = subprocess.run(
    [sys.executable, "-c", "import torch"], env={**plain, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True
).stderr
policy, count = (re.search(rf"{name} = '(\w+)'", told)[1] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
times = {(n, spins): [] for n in (1, 2) for spins in ("", "3000")}
for _ in range(3):
    for (n, spins), found in times.items():
        found.append(at_once(n, **({"GOMP_SPINCOUNT": spins} if spins else {})))
alone, both, alone_less, both_less = (statistics.median(times[n, s]) for s in ("", "3000") for n in (1, 2))
print(f"versions: torch {version('torch')}, {os.cpu_count()} cores")
print("expected: a passive thread sleeps, and two processes at once take about twice as long as one")
print(f"seen: OMP_WAIT_POLICY {policy}, GOMP_SPINCOUNT {count}")
print(f"seen: one process {alone:.2f} s, two at once {both:.2f} s; with GOMP_SPINCOUNT=3000 {alone_less:.2f} and {both_less:.2f} s")
assert (policy, count) == ("PASSIVE", "300000")
assert both > 1.3 * both_less
PY
