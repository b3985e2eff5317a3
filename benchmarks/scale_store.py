"""The store of benchmarks/scale.py: how it is made, and the commands that meet it."""

import sys
from pathlib import Path

import numpy as np

from storage.artifacts import ArtifactStore
from storage.runs import RunRecord
from storage.tables import sample_writer, write_table
from storage.warehouse import Warehouse

LAYERS, HEADS, CHANNELS, SAMPLES, ITEMS, STEPS = 4, 4, 60, 4, 100, 50
CRITERIA = str(Path(__file__).parents[1] / "configs/criteria.toml"), ("data='mini'",)
METRIC = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": ITEMS, "protocol": "p", "papers": True, "data": "mini"}
STAGES: tuple[tuple[str, str | None, str | None], ...] = (
    ("calibrate", None, None),
    ("score", None, None),
    ("fuse", None, None),
    ("fluctuation", None, None),
    ("prune", "pruned", None),
    ("recover", "recovered", None),
    ("evaluate", "pruned", "boolq"),
    ("evaluate", "pruned", "piqa"),
    ("evaluate", "recovered", "boolq"),
    ("speed", None, None),
)


def coordinates(layers: int, heads: int, channels: int) -> dict[str, np.ndarray]:
    return {
        "layer": np.repeat(np.arange(layers, dtype=np.int32), heads + channels),
        "kind": np.tile(np.repeat(["attention", "mlp"], [heads, channels]), layers),
        "unit": np.tile(np.concatenate([np.arange(heads), np.arange(channels)]).astype(np.int32), layers),
    }


def body(folder: Path, stage: str, benchmark: str | None, rng: np.random.Generator) -> None:
    """What the stage publishes, small."""
    where = coordinates(LAYERS, HEADS, CHANNELS)
    count = len(where["layer"])
    if stage == "score":
        values = rng.lognormal(size=(2, SAMPLES, count)).astype(np.float32)
        with sample_writer(folder, "importance", where) as writer:
            writer.write(vector=values[0], element=values[1])
    elif stage == "fuse":
        with sample_writer(folder, "fused", where) as writer:
            writer.write(fused=rng.normal(size=(SAMPLES, count)))
    elif stage == "fluctuation":
        names = ("rank_score", "weight_norm_sq", "mean_fused", "fluctuation", "asi")
        table = {name: rng.normal(size=count) for name in names}
        write_table(folder, "groups", {**where, "parameters": np.ones(count, np.int64), **table})
    elif stage == "prune":
        row = {"units": CHANNELS, "kept": 32, "parameters": 600, "kept_parameters": 320}
        write_table(folder, "widths", [{"layer": layer, "kind": "mlp", **row} for layer in range(LAYERS)])
        (folder / "model.safetensors").write_bytes(rng.bytes(1000))
    elif stage == "recover":
        row = {"epoch": 0.1, "learning_rate": 1e-4, "tokens_per_s": 100.0, "held_out_loss": None}
        write_table(folder, "training", [{"step": step, "loss": float(rng.random()), **row} for step in range(STEPS)])
        (folder / "model.safetensors").write_bytes(rng.bytes(1000))
    elif stage == "evaluate":
        write_table(folder, "metrics", [{"benchmark": benchmark, **METRIC, "value": float(rng.random())}])
        about = {"benchmark": benchmark, "metric": "acc", "protocol": "p"}
        right = rng.integers(0, 2, ITEMS)
        write_table(folder, "items", [{**about, "item": i, "value": float(v)} for i, v in enumerate(right)])
    elif stage == "speed":
        row = {"tokens_per_s": 10.0, "decode_ratio": 1.0, "parameters": 1000, "weight_bytes": 2000}
        write_table(folder, "speed", [{"variant": variant, **row} for variant in ("dense", "pruned", "recovered")])
    else:
        (folder / "tokens").write_bytes(rng.bytes(1000))


def add_run(store: ArtifactStore, number: int) -> RunRecord:
    """A run with ten artifacts of its own, but not yet its end."""
    from tasks.config import RunConfig

    rng = np.random.default_rng(number)
    config = RunConfig(name=f"sweep{number // 100}", store=str(store.root), calibrate={"seed": number})
    about = {"name": config.name, "model": "m", "data": "mini", "ratio": 0.2, "criterion": "saap"}
    record = RunRecord(store.root, f"2026-01-01-{number:06d}", **about, config=config.model_dump_json())
    for position, (stage, variant, benchmark) in enumerate(STAGES):
        key, params = f"{number:08x}{position:012x}", {"seed": number} | ({"benchmark": benchmark} if benchmark else {})
        with store.lock(stage, key), store.publish(stage, key, run_id=record.run_id, params=params) as folder:
            body(folder, stage, benchmark, rng)
        record.stage(position, stage=stage, key=key, variant=variant, benchmark=benchmark, cached=False, seconds=1.0)
    return record


def fill(folder: Path, count: int) -> None:
    store = ArtifactStore(folder)
    store.prepare()
    for number in range(count):
        add_run(store, number).finish("completed")


def fill_sweep(folder: Path, _: int) -> None:
    """The 72 runs of configs/criteria.toml, by the keys that its steps have."""
    from flows.combinations import combinations
    from flows.dag import build
    from tasks.config import load_config
    from tasks.outside import Outside

    store, outside = ArtifactStore(folder), None
    for number, chosen in enumerate(combinations(*CRITERIA)):
        settings = load_config(CRITERIA[0], (*chosen, *CRITERIA[1], f"store='{folder}'"))
        outside = outside or Outside(settings)
        about = {"name": "criteria", "model": settings.model.path, "data": "mini", "ratio": settings.prune.ratio}
        about |= {"criterion": settings.criterion.name, "config": settings.model_dump_json()}
        record = RunRecord(store.root, f"2026-02-01-{number:06d}", **about)
        for position, step in enumerate(build(settings, record.run_id, outside)):
            cached = store.inspect(*step.reference)[0] is not None
            if not cached:
                with store.lock(*step.reference), store.publish(*step.reference, run_id=record.run_id) as artifact:
                    body(artifact, step.stage, step.benchmark, np.random.default_rng(number))
            place = {"stage": step.stage, "key": step.key, "variant": step.variant, "benchmark": step.benchmark}
            record.stage(position, **place, cached=cached, seconds=1.0)
        record.finish("completed")


def first_load(folder: Path, _: int) -> None:
    Warehouse(folder).sync()


def run(folder: Path, count: int) -> None:
    """One more run, as `saap run` records it: at the start, after each of its ten steps, and at the end."""
    store, house = ArtifactStore(folder), Warehouse(folder)
    store.prepare()
    house.sync()
    record = add_run(store, count)
    for _ in range(len(STAGES) + 1):
        house.load(record.run_id)
    record.finish("completed")
    house.load(record.run_id)


def _saap(*arguments: str) -> None:
    from flows.cli import main

    sys.argv[1:] = arguments
    main()


def plan(folder: Path, _: int) -> None:
    _saap("plan", str(Path(__file__).parents[1] / "configs/demo.toml"), "--store", str(folder))


def start(folder: Path, _: int) -> None:
    """All that `saap run` does before its first step, Prefect's own server aside."""
    from flows.job import prepare
    from tasks.config import load_config

    job = prepare(load_config(str(Path(__file__).parents[1] / "configs/demo.toml"), (f"store='{folder}'",)))
    store = ArtifactStore(job.settings.store)
    store.prepare()
    Warehouse(store.root).sync()


def leaderboard(folder: Path, _: int) -> None:
    _saap("sql", "from leaderboard limit 20", "--store", str(folder))


def importance(folder: Path, _: int) -> None:
    _saap("sql", "select key, avg(vector) from importance group by key order by 2 limit 20", "--store", str(folder))


def significance(folder: Path, _: int) -> None:
    _saap("sql", "select count(*) from significance", "--store", str(folder))


def show(folder: Path, _: int) -> None:
    _saap("show", "--store", str(folder))


def report(folder: Path, _: int) -> None:
    """The newest run: its table and its page."""
    _saap("report", "--store", str(folder))


def report_sweep(folder: Path, _: int) -> None:
    """The page of a hundred runs."""
    _saap("report", "sweep0", "--html", str(folder / "sweep0.html"), "--store", str(folder))


def compare(folder: Path, _: int) -> None:
    _saap("compare", CRITERIA[0], "--set", *CRITERIA[1], "--store", str(folder))


def gc(folder: Path, _: int) -> None:
    _saap("gc", "--store", str(folder))


def gc_older(folder: Path, _: int) -> None:
    """Everything would go."""
    _saap("gc", "--older", "0", "--store", str(folder))


def du(folder: Path, _: int) -> None:
    _saap("du", "--store", str(folder))


def verify(folder: Path, _: int) -> None:
    _saap("verify", "--store", str(folder))


def rebuild(folder: Path, _: int) -> None:
    _saap("rebuild", "--store", str(folder))


ACTIONS = (
    *(fill, fill_sweep, first_load, plan, start, run, leaderboard, importance, significance),
    *(show, report, report_sweep, compare, gc, gc_older, du, verify, rebuild),
)
