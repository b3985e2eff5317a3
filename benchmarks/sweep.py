"""What a sweep costs: cached runs, the machinery around a step, and what two slots gain over one.

    python benchmarks/sweep.py                # a quarter of an hour on two idle cores
    python benchmarks/sweep.py --rounds 3 --only criteria

A random Llama, the mini pack, every stage and all nine benchmarks (34 steps a run) for the cached runs: a sweep of 12
and one of 1, each by `saap sweep` on a store that has everything. Then steps that do nothing through the whole
machinery. Then a sweep of 8 runs, two models at four ratios, with one thread each, by one slot and by two in turn; its
seconds begin with the first step, since a worker that starts imports torch once. Then the 72 runs of
configs/criteria.toml, at tiny settings, on a store that has everything. Prints as its last line one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import embedded, processor

from storage.artifacts import MANIFEST
from storage.warehouse import Warehouse

HERE = Path(__file__).resolve().parents[1]
RATIOS = [round(0.04 + 0.03 * number, 2) for number in range(12)]
QUICK = """
calibrate = { count = 4, length = 16 }
prune = { align = 8, protect = [0, -1] }
recover = { examples = 8, batch_size = 4, micro_batch_size = 4, rank = 4, group_size = 16, max_length = 96 }
evaluate = { limit = 2, windows = [32], max_tokens = 128 }
speed = { prompt_tokens = 8, new_tokens = 4, runs = 1, warmup = 0 }
"""
WORK = """
calibrate = { count = 32, length = 128 }
prune = { align = 8, protect = [0, -1] }
recover = { recipe = "lora", examples = 96, batch_size = 8, micro_batch_size = 8, rank = 8, max_length = 128 }
evaluate = { benchmarks = ["arc_easy", "hellaswag", "wikitext2"], windows = [128] }
speed = { runs = 0 }
"""


def checkpoint(folder: Path, hidden: int, layers: int, seed: int = 0) -> Path:
    """A random Llama with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import saap

    torch.manual_seed(seed)
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True}
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**size, **small, max_position_embeddings=256)).save_pretrained(folder)
    with tempfile.TemporaryDirectory() as made:
        saap.load_tokenizer(embedded(Path(made))).save_pretrained(folder)
    return folder


def config(folder: Path, name: str, models: list[Path], sections: str, ratios: list[float]) -> Path:
    file = folder / f"{name}.toml"
    compute = 'compute = { device = "cpu", threads = 1 }'
    axes = f'"model.path" = {[str(model) for model in models]}, "prune.ratio" = {ratios}'
    head = f'name = "{name}"\nsweep = {{ {axes} }}\n{compute}\n'
    file.write_text(head + sections)
    return file


def sweep(file: Path, store: Path, *overrides: str) -> float:
    """Seconds of `saap sweep`."""
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "flows.cli", "sweep", file, "--store", store, "--quiet", *sets]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def cached(folder: Path, rounds: int) -> dict[str, float]:
    """Of sweeps that find everything: seconds of one of one run, and of each further run of one of 12."""
    model, store = checkpoint(folder / "small", 64, 4), folder / "cached"
    many, one = (config(folder, f"cached{len(r)}", [model], QUICK, r) for r in (RATIOS, RATIOS[:1]))
    sweep(many, store)
    seconds = [(sweep(one, store), sweep(many, store)) for _ in range(rounds)]
    first, all_ = (statistics.median(of) for of in zip(*seconds, strict=True))
    return {"cached_first_seconds": first, "cached_run_seconds": (all_ - first) / (len(RATIOS) - 1)}


def criteria(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of configs/criteria.toml, tiny, when everything is there."""
    model = checkpoint(folder / "ranked", 64, 4)
    tiny = ("calibrate.count=4", "calibrate.length=16", "prune.align=8", "prune.protect=[0]")
    text = ("data='mini'", "evaluate.windows=[32]", "evaluate.max_tokens=128")
    settings = (f"model.path='{model}'", "compute.device='cpu'", "compute.threads=1", *tiny, *text)
    file, store = HERE / "configs" / "criteria.toml", folder / "criteria"
    sweep(file, store, *settings)
    return {"criteria_cached_seconds": statistics.median(sweep(file, store, *settings) for _ in range(rounds))}


def step_overhead(folder: Path, steps: int = 100) -> float:
    """Milliseconds of a step that does nothing, from its start to the next one's, in a run of so many."""
    import importlib

    from flows.job import Job
    from flows.server import prefect_api, quiet_settings
    from tasks.artifact import Artifact
    from tasks.config import RunConfig
    from tasks.stage import stage
    from tasks.step import Step

    store = folder / "empty"
    store.mkdir()
    quiet_settings(store)

    @stage(version=1, publishes=Artifact, params=lambda config: {})
    def calibrate(step: Step, folder: Path) -> dict[str, Any]:
        (folder / "nothing.txt").write_text(step.key)
        return {"nothing": 0}

    module = importlib.import_module("tasks.stages.calibrate")
    there, module.calibrate = module.calibrate, calibrate  # type: ignore[attr-defined]
    settings = RunConfig(store=str(store))

    def seconds(name: str, count: int) -> float:
        made = [
            Step("calibrate", f"{name}{n}", "{}", (), (), '{"device": "cpu"}', str(store), name) for n in range(count)
        ]
        start = time.perf_counter()
        flow_of(Job(settings, name, made))(None, [])
        return time.perf_counter() - start

    with prefect_api(store):
        from flows.progress import show_progress
        from flows.run import flow_of

        show_progress("quiet")
        seconds("warm", 1)
        few, many = seconds("few", 1), seconds("many", 1 + steps)
    module.calibrate = there  # type: ignore[attr-defined]
    return 1000 * (many - few) / steps


def work_seconds(store: Path) -> float:
    """From the start of the first step to the end of the last."""
    found = [json.loads(file.read_text()) for file in store.glob(f"*/*/{MANIFEST}")]
    return max(m["finished_at"] for m in found) - min(m["finished_at"] - m["seconds"] for m in found)


def parallel(folder: Path, rounds: int) -> dict[str, float]:
    """Two slots against one, and what they found against one process."""
    models = [checkpoint(folder / f"large{seed}", 512, 8, seed) for seed in (0, 1)]
    file = config(folder, "parallel", models, WORK, RATIOS[:4])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for slots in (1, 2) if number % 2 == 0 else (2, 1):
            store = folder / f"slots{slots}"
            shutil.rmtree(store, ignore_errors=True)
            sweep(file, store, "execute.runner='processes'", f"execute.slots={slots}")
            seconds[slots].append(work_seconds(store))
    sweep(file, folder / "serial")
    with Warehouse(folder / "slots2").reading() as connection:
        (again,) = connection.execute(
            "select count(*) - count(distinct key) from stage_runs where not cached"
        ).fetchall()
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {
        "parallel_speedup": statistics.median(ratios),
        "one_slot_seconds": statistics.median(seconds[1]),
        "two_slots_seconds": statistics.median(seconds[2]),
        "duplicate_steps": again[0],
        "rows_equal_to_serial": int(rows(folder / "serial") == rows(folder / "slots2")),
    }


def rows(store: Path) -> list[str]:
    """All that the runs found, without their ids and times."""
    without = {
        "metrics": "run_id",
        "items": "",
        "groups": "run_id",
        "widths": "run_id",
        "training": "run_id, tokens_per_s",
        "stage_runs": "run_id, cached, seconds, finished_at",
    }
    with Warehouse(store).reading() as connection:
        return sorted(
            f"{table} {row}"
            for table, columns in without.items()
            for row in connection.execute(
                f"select * {f'exclude ({columns})' if columns else ''} from {table}"
            ).fetchall()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["cached", "overhead", "parallel", "criteria"])
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        print(f"{processor()}; load {os.getloadavg()[0]:.1f} before")
        if arguments.only in (None, "cached"):
            figures |= cached(folder, arguments.rounds)
        if arguments.only in (None, "overhead"):
            figures["step_overhead_ms"] = step_overhead(folder)
        if arguments.only in (None, "parallel"):
            figures |= parallel(folder, arguments.rounds)
        if arguments.only in (None, "criteria"):
            figures |= criteria(folder, arguments.rounds)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)
    os._exit(0)  # Prefect's threads would outlive the clean-up


if __name__ == "__main__":
    main()
