"""The pages of a run and of a sweep: seconds to write them, seconds until a browser has drawn them, and their size.

python benchmarks/report_page.py [--runs 60] [--rounds 5]

The store is made up: every number in it is drawn at random, its shapes are those of SmolLM2-135M's. Both pages are
taken in turn. Needs Chromium.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flows.pages.write import write_report, write_sweep
from tests.flows.pages import made

CRITERIA = ("saap", "saap_plus", "flap", "wanda_sp", "magnitude")


def store_of(root: Path, runs: int) -> list[str]:
    """A run with all stages of a 30-layer model, then a sweep of `runs` runs over two models. Returns the run ids."""
    layers, heads, channels = 30, 3, 1536
    made.LAYERS, made.HEADS, made.CHANNELS, made.SAMPLES = layers, heads, channels, 50
    made.GROUPS = {
        "layer": np.repeat(np.arange(layers, dtype=np.int32), heads + channels),
        "kind": np.array((["attention"] * heads + ["mlp"] * channels) * layers),
        "unit": np.tile(np.concatenate([np.arange(heads), np.arange(channels)]), layers).astype(np.int32),
    }
    maker = made.Maker(root)
    maker.run("run")
    chosen = itertools.product(("smollm2-135m", "/models/llama-7b"), CRITERIA, (0.2, 0.5), range(runs // 20))
    run_ids = []
    for number, (model, criterion, ratio, seed) in enumerate(chosen):
        config = {"model": {"path": model}, "criterion": {"name": criterion}, "prune": {"ratio": ratio}}
        run_ids.append(f"sweep-{number:03d}")
        maker.run(run_ids[-1], config | {"calibrate": {"seed": seed}}, stages=("prune", "recover", "speed"))
    maker.warehouse.rebuild()
    return run_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60, help="of the sweep, in twenties")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        run_ids = store_of(root, options.runs)
        write_report(root, "run")  # the library is made once a process
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _, name in itertools.product(range(options.rounds), ("run", "sweep")):
            times = seconds.setdefault(name, {"write": [], "draw": []})
            start = time.perf_counter()
            file = write_report(root, "run") if name == "run" else write_sweep(root, "sweep", run_ids, root / "s.html")
            times["write"].append(time.perf_counter() - start)
            sizes[name] = file.stat().st_size
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(file.as_uri())
            page.wait_for_selector("body[data-drawn]", state="attached")
            times["draw"].append(time.perf_counter() - start)
            page.close()
        browser.close()
    print(f"{os.cpu_count()} cores, {platform.machine()}; a run of 30 layers, a sweep of {len(run_ids)} runs")
    print(f"{'page':<8}{'MB':>6}{'write, s':>10}{'spread':>8}{'draw, s':>10}{'spread':>8}")
    for name, times in seconds.items():
        cells = [f"{statistics.median(times[what]):>10.2f}{max(t) - min(t):>8.2f}" for what, t in times.items()]
        print(f"{name:<8}{sizes[name] / 1e6:>6.1f}{''.join(cells)}")
    medians = {name: {w: statistics.median(t) for w, t in times.items()} for name, times in seconds.items()}
    print(json.dumps({"runs": len(run_ids), "bytes": sizes, "seconds": medians}))


if __name__ == "__main__":
    main()
