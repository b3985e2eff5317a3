"""Two runs at once on the same cores: OpenMP's waiting threads as libgomp has them, and as `saap` sets them.

    python benchmarks/busy.py                # the embedded SmolLM2-135M; with as many threads as there are cores
    python benchmarks/busy.py --rounds 5

A thread that waits for the others of its product looks again and again, and sleeps after so many looks. libgomp's own
number is 300,000; GOMP_SPINCOUNT, which `saap` sets where the user has set nothing, is 3,000. Scores a sample, makes
the logits of eight windows and decodes 16 tokens, in processes of their own because libgomp reads the number when it is
loaded: both numbers in turn, one process alone and two at once. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import embedded, processor

import saap
from flows.server import SPINS

TRIES = 3  # of each piece of work in a process; the median counts
SETTINGS = {"libgomp's own": {}, f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": SPINS}}


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own: the seconds of each piece of work."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = saap.load(folder, dtype="bfloat16").requires_grad_(False)
    tokens = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    work: dict[str, Callable[[], object]] = {
        "score": lambda: saap.score(model, tokens[:1]),
        "logits": lambda: model(tokens, use_cache=False),
        "decode": lambda: model.generate(tokens[:1, :8], max_new_tokens=16, min_new_tokens=16, do_sample=False),
    }
    seconds = {}
    for name, piece in work.items():
        piece()
        taken = []
        for _ in range(TRIES):
            start = time.perf_counter()
            piece()
            taken.append(time.perf_counter() - start)
        seconds[name] = statistics.median(taken)
    return seconds


def at_once(folder: Path, setting: dict[str, str], processes: int) -> dict[str, float]:
    """`measure` in so many processes at once; the slowest's seconds."""
    users = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--measure", str(folder)]
    about: dict[str, Any] = {"env": {**users, "TQDM_DISABLE": "1", **setting}, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **about) for _ in range(processes)]
    found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]
    return {work: max(one[work] for one in found) for work in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = embedded(Path(temporary))
        found = [
            {
                (processes, name): at_once(folder, setting, processes)
                for processes in (1, 2)
                for name, setting in SETTINGS.items()
            }
            for _ in range(arguments.rounds)
        ]
    own, ours = SETTINGS
    rows = []
    print(f"{'':<26}{own:>16}{ours:>24}   ours / libgomp's (lowest to highest of {arguments.rounds})")
    for processes in (1, 2):
        for work in found[0][processes, own]:
            times = {name: statistics.median(one[processes, name][work] for one in found) for name in SETTINGS}
            ratios = sorted(one[processes, ours][work] / one[processes, own][work] for one in found)
            row = {
                "work": work,
                "processes": processes,
                "ratio": statistics.median(ratios),
                "spread": [ratios[0], ratios[-1]],
            }
            rows.append({**row, "seconds": times})
            beside = "alone" if processes == 1 else "two at once"
            print(
                f"{work + ', ' + beside:<26}{times[own]:>14.2f} s{times[ours]:>22.2f} s"
                f"   {row['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
    print(json.dumps({"machine": processor(), "rows": rows}))


if __name__ == "__main__":
    main()
