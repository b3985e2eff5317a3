"""The whole job against another build of this project, stage by stage, in turn on one machine.

    git worktree add ../before d92d87d
    python benchmarks/whole_job.py --against ../before                     # 10 to 20 minutes
    python benchmarks/whole_job.py --against ../before --rounds 3 --no-plus

Both builds run the same configuration, configs/demo.toml of the other build with the defaults of that commit and what
--set changes in it, each into a store of its own that is empty at first: from the command to its end, and the
processor's seconds for it, which other work on the machine disturbs less; then the same command again, all of it
cached; then `saap_plus` at 0.5 up to the pruned model. Seconds of a stage are those its manifests have. The peak is
the largest resident memory of one process. Prints tables, how far the results of the two builds are apart, and, as
its last line, one JSON object of ratios new / old (medians over the rounds).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import processor

HERE = Path(__file__).resolve().parents[1]
PLUS = [
    'criterion.name="saap_plus"',
    "prune.ratio=0.5",
    'recover.recipe="none"',
    "evaluate.benchmarks=[]",
    "speed.runs=0",
]
# what was the default at that commit and is no more; fields it did not have are set only where a build knows them
THEN = ['prune.search="global"', "calibrate.own=0", 'criterion.take_heads="pooled"', "prune.ridge=1.0"]
THEN += ["recover.prose=0", "recover.own=0", "recover.learning_rate=1e-3"]
RANKING = ("gradients", "activations", "fisher", "rank", "prune")  # what `saap_plus` does beyond the model and its text
STAGES = ("model", "score", "prune", "recover", "evaluate", "speed")

Figures = dict[str, float]
Results = dict[tuple[str, ...], float]


class Build:
    """One build: the folder of its code, the interpreter of its environment, and the configuration both run."""

    def __init__(self, folder: Path, python: Path, config: Path, overrides: list[str]) -> None:
        fields = "".join(file.read_text() for file in (folder / "tasks").glob("*.py"))
        then = [setting for setting in THEN if f"    {setting.partition('=')[0].partition('.')[2]}: " in fields]
        self.folder, self.python, self.config, self.overrides = folder, python, config, [*then, *overrides]

    def run(self, store: Path, more: list[str]) -> tuple[float, float, float]:
        """Of one `saap run`: seconds, those of the processor, and the largest resident memory of a process in bytes."""
        sets = [word for override in (*self.overrides, *more) for word in ("--set", override)]
        command = [self.python, "-m", "flows.cli", "run", self.config, "--store", store, *sets]
        # the code of this folder comes first, whatever project the environment was installed from
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "TQDM_DISABLE": "1"}
        log = store.with_suffix(".log")
        start = time.perf_counter()
        with log.open("ab") as out:
            child = subprocess.Popen(list(map(str, command)), cwd=self.folder, env=environment, stdout=out, stderr=out)
            _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{self.folder}: the run failed\n{log.read_text()[-2000:]}")
        return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024

    def measure(self, store: Path, plus: bool) -> tuple[Figures, Results]:
        """The seconds of everything, the peak in bytes, and the results of the job."""
        figures: Figures = {}
        figures["demo"], figures["processor"], figures["peak"] = self.run(store, [])
        figures |= {stage: seconds for stage, seconds in stage_seconds(store).items() if stage in STAGES}
        results = results_in(store)
        figures["cached"], *_ = self.run(store, [])
        if plus:
            before = stage_seconds(store)
            self.run(store, PLUS)
            spent = stage_seconds(store)
            figures["ranking of saap_plus"] = sum(spent.get(s, 0.0) - before.get(s, 0.0) for s in RANKING)
        return figures, results


def stage_seconds(store: Path) -> Figures:
    """Seconds of each stage, all its steps together."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for manifest in store.glob("*/*/manifest.json"):
        about = json.loads(manifest.read_text())
        seconds[about["stage"]] += about["seconds"]
    return dict(seconds)


def results_in(store: Path) -> Results:
    """Every metric of the run by (variant, benchmark, metric, protocol)."""
    found: Results = {}
    models = {"model": "dense", "prune": "pruned", "recover": "recovered"}
    for manifest in store.glob("evaluate/*/manifest.json"):
        taken = [stage for _, stage, *_ in json.loads(manifest.read_text())["inputs"]]
        for row in pq.read_table(manifest.parent / "metrics.parquet").to_pylist():
            found[models[taken[0]], row["benchmark"], row["metric"], row["protocol"]] = row["value"]
    return found


def print_differences(new: Results, old: Results) -> None:
    """How far the results are apart: accuracies in points, perplexities relative to the old one."""
    for variant in ("dense", "pruned", "recovered"):
        shared = [key for key in new if key[0] == variant and key in old]
        if not shared:
            continue
        ratios = [abs(new[key] / old[key] - 1) for key in shared if key[2] == "perplexity"]
        points = [100 * abs(new[key] - old[key]) for key in shared if key[2] != "perplexity"]
        equal = sum(point == 0 for point in points)
        print(
            f"{variant}: {equal} of {len(points)} accuracies are equal, the others at most "
            f"{max(points, default=0):.1f} points apart; perplexities differ by {max(ratios, default=0):.1e} at most"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="folder of the other build")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter for the other build")
    parser.add_argument(
        "--config", type=Path, help="one that both know; configs/demo.toml of the other build when absent"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-plus", action="store_true", help="leave out the ranking by saap_plus")
    arguments = parser.parse_args()
    config = (arguments.config or arguments.against / "configs" / "demo.toml").resolve()
    builds = {
        "new": Build(HERE, Path(sys.executable), config, arguments.overrides),
        "old": Build(arguments.against.resolve(), arguments.python.absolute(), config, arguments.overrides),
    }
    taken: dict[str, list[Figures]] = {"new": [], "old": []}
    results: dict[str, Results] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            for side in ("old", "new") if turn % 2 == 0 else ("new", "old"):
                store = Path(folder) / f"{side}{turn}"
                figures, results[side] = builds[side].measure(store, not arguments.no_plus)
                taken[side].append(figures)
                shutil.rmtree(store)
                print(side, {name: round(value, 1) for name, value in figures.items() if name != "peak"}, flush=True)

    print(f"\n{config.name}, {arguments.rounds} round(s), {processor()}")
    print(f"{'':<22}{'old':>10}{'new':>10}{'new / old':>11}{'spread':>9}")
    ratios: Figures = {}
    for name in [name for name in taken["new"][0] if name in taken["old"][0]]:
        new, old = (np.array([figures[name] for figures in taken[side]]) for side in ("new", "old"))
        ratios[name] = float(np.median(new / old))
        unit = 1e6 if name == "peak" else 1
        print(
            f"{name + (', MB' if name == 'peak' else ', s'):<22}{np.median(old) / unit:>10.1f}"
            f"{np.median(new) / unit:>10.1f}{ratios[name]:>11.3f}{np.ptp(new / old):>9.3f}"
        )
    print_differences(results["new"], results["old"])
    keys = {name: f"{name}_ratio" for name in ratios} | {"ranking of saap_plus": "rank_ratio_plus"}
    print(json.dumps({keys[name]: round(ratio, 3) for name, ratio in ratios.items()} | {"machine": processor()}))


if __name__ == "__main__":
    main()
