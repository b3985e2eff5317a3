"""Time decoding with narrower layers, for a target of speed."""

from pathlib import Path
from typing import Any

from storage.tables import read_table, write_table
from tasks.artifact import Artifact
from tasks.config import RunConfig
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.speed import machine_name
from tasks.step import Step

NEW_TOKENS, RUNS, WARMUP = 32, 9, 1  # of each width


class LayerTimes(Artifact):
    """layer_times.parquet."""

    def read(self) -> list[tuple[str, float, float]]:
        """(kind, share of its units that stay, time for a token beside the dense model's)."""
        table = read_table(self.place, "layer_times")
        return list(zip(*(table[name].tolist() for name in ("kind", "kept", "time")), strict=True))


def _params(config: RunConfig) -> dict[str, Any]:
    machine = machine_name(config.compute.device, config.compute.threads)
    own = {"prompt_tokens": config.speed.prompt_tokens, "align": config.prune.align, "machine": machine}
    return groups_of(config) | own


@stage(version=1, publishes=LayerTimes, params=_params, fingerprint=weights_of)
def layer_times(step: Step, folder: Path, *, model: Checkpoint) -> Summary:
    import saap

    config = step.config()
    dense = load_model(step, model)
    groups, rows = saap.discover(dense), []
    for kind, share, keep in saap.narrowed(groups, config["align"]):
        pair = {"dense": dense, "narrow": saap.prune(dense, keep)}
        sizes = {name: saap.size_of(one) for name, one in pair.items()}
        lengths = {"prompt_tokens": config["prompt_tokens"], "new_tokens": NEW_TOKENS}
        _, narrow = saap.compare_speed(pair, sizes, **lengths, runs=RUNS, warmup=WARMUP)
        rows.append({"kind": kind, "kept": share, "time": 1 / narrow.decode_ratio})
    write_table(folder, "layer_times", rows)
    return {f"{row['kind']} {row['kept']:.2f}": f"{row['time']:.3f}" for row in rows}
