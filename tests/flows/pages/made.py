"""A store of published artifacts with made-up numbers; a page must show what the warehouse says of them."""

import numpy as np

from storage.artifacts import ArtifactStore
from storage.keys import digest
from storage.runs import RunRecord
from storage.tables import sample_writer, write_table
from storage.warehouse import Warehouse
from tasks.config import RunConfig, check_config

LAYERS, CHANNELS, HEADS, SAMPLES = 4, 96, 2, 3
GROUPS = {
    "layer": np.repeat(np.arange(LAYERS, dtype=np.int32), HEADS + CHANNELS),
    "kind": np.array((["attention"] * HEADS + ["mlp"] * CHANNELS) * LAYERS),
    "unit": np.tile(np.concatenate([np.arange(HEADS), np.arange(CHANNELS)]), LAYERS).astype(np.int32),
}


STAGES = ("score", "fluctuation", "prune", "recover", "speed")


class Maker:
    """Publishes runs into a store. Every number is drawn from the seed."""

    def __init__(self, root, seed=0):
        self.store = ArtifactStore(root)
        self.store.prepare()
        self.random = np.random.default_rng(seed)
        self.warehouse = Warehouse(self.store.root)

    def run(self, run_id, config=None, finished=True, stages=STAGES):
        """A run of these stages and the evaluation of its variants. Returns its record; the warehouse is not loaded."""
        settings: RunConfig = check_config(config or {})
        about = {"model": settings.model.path, "data": settings.data, "criterion": settings.criterion.name}
        about |= {"ratio": settings.prune.ratio, "config": settings.model_dump_json()}
        record = RunRecord(self.store.root, run_id, name=settings.name, **about)
        position = 0
        for stage in stages:
            key = digest([run_id, stage])
            with self.store.publish(stage, key, run_id=run_id, versions={"torch": "2.13.0"}) as folder:
                getattr(self, f"_{stage}")(folder)
            record.stage(position, stage=stage, key=key, variant=None, benchmark=None, cached=False, seconds=1.25)
            position += 1
        variants = [
            "dense",
            *(name for name, stage in (("pruned", "prune"), ("recovered", "recover")) if stage in stages),
        ]
        for variant in variants:
            for benchmark in settings.evaluate.benchmarks:
                key = self._evaluated(run_id, settings, variant, benchmark)
                about = {"stage": "evaluate", "key": key, "variant": variant, "benchmark": benchmark}
                record.stage(position, **about, cached=variant == "dense", seconds=0.5)
                position += 1
        if finished:
            record.finish("completed")
        return record

    def _evaluated(self, run_id, settings, variant, benchmark):
        """Perplexities in the settings' windows; the dense model once a model and how."""
        dense = [settings.model.path, settings.evaluate.max_tokens]
        key = digest([*(dense if variant == "dense" else [run_id]), variant, benchmark])
        if self.store.find("evaluate", key) is None:
            perplexity = benchmark in ("wikitext2", "ptb")
            about = {"benchmark": benchmark, "metric": "perplexity" if perplexity else "acc", "n": 100, "data": "mini"}
            rows = []
            for window in settings.evaluate.windows if perplexity else (None,):
                value = self.random.uniform(400, 600) if perplexity else self.random.uniform(0.3, 0.9)
                protocol = f"p, windows of {window}" if perplexity else "p"
                numbers = {"value": value, "stderr": value / 20}
                rows.append(about | numbers | {"protocol": protocol, "papers": window in (None, 128)})
            with self.store.publish("evaluate", key, run_id=run_id) as folder:
                write_table(folder, "metrics", rows)
        return key

    def _score(self, folder):
        with sample_writer(folder, "importance", GROUPS) as writer:
            shape = (SAMPLES, len(GROUPS["layer"]))
            writer.write(**{name: self.random.random(shape).astype(np.float32) for name in ("vector", "element")})

    def _fluctuation(self, folder):
        count = len(GROUPS["layer"])
        values = {
            name: self.random.random(count)
            for name in ("rank_score", "weight_norm_sq", "mean_fused", "fluctuation", "asi")
        }
        write_table(folder, "groups", GROUPS | values | {"parameters": np.full(count, 10)})

    def _prune(self, folder):
        rows = [
            {
                "layer": layer,
                "kind": kind,
                "units": units,
                "kept": kept,
                "parameters": 10 * units,
                "kept_parameters": 10 * kept,
            }
            for layer in range(LAYERS)
            for kind, units, kept in (
                ("attention", HEADS, HEADS),
                ("mlp", CHANNELS, int(self.random.integers(32, CHANNELS))),
            )
        ]
        write_table(folder, "widths", rows)

    def _recover(self, folder):
        rows = [
            {"step": step, "epoch": step / 20, "loss": 4 - step / 10 + self.random.random(), "learning_rate": 1e-3,
             "tokens_per_s": 900.0, "held_out_loss": 3 - step / 20 if step % 10 == 0 else None}
            for step in range(1, 21)
        ]  # fmt: skip
        write_table(folder, "training", rows)

    def _speed(self, folder):
        rows = []
        for place, variant in enumerate(("dense", "pruned", "recovered")):
            numbers = {"tokens_per_s": self.random.uniform(20, 60), "decode_ratio": self.random.uniform(1, 3)}
            numbers |= {"parameters": 10**8 - 10**7 * place, "weight_bytes": int(self.random.integers(10**6, 10**8))}
            rest = dict.fromkeys(
                ("tokens_per_s_spread", "eager_tokens_per_s", "prefill_tokens_per_s", "prefill_ratio"), 1.0
            )
            rest |= {"peak_bytes": float("nan"), "macs_per_token": 7, "dtype": "float32", "device": "cpu", "threads": 1}
            rest |= {"batch_size": 1, "prompt_tokens": 8, "new_tokens": 4, "runs": 2}
            rows.append({"variant": variant} | numbers | rest)
        write_table(folder, "speed", rows)
