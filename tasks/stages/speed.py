"""Speed, memory and size of the variants of a run, alternating in one process."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.artifact import Artifact
from tasks.compute import compute_settings
from tasks.config import RunConfig
from tasks.inputs import Weights, forget_model
from tasks.stage import Summary, dtype_of, stage, weights_of
from tasks.step import Step
from tasks.values import parse_target

OFF = 0.05  # of a speed: what a target may be missed by


class Speeds(Artifact):
    """speed.parquet."""


def _params(config: RunConfig) -> dict[str, Any]:
    machine = machine_name(config.compute.device, config.compute.threads)
    if config.execute.runner == "ray":  # one of its nodes measures, this machine or not
        machine = f"a node of Ray at {config.execute.address or 'this machine'}, {config.compute.device}"
    target = {"target": config.prune.target} if config.prune.target_is_speed else {}
    return config.speed.model_dump() | dtype_of(config) | {"machine": machine} | target


@stage(version=2, publishes=Speeds, params=_params, fingerprint=weights_of)
def speed(step: Step, folder: Path, *, dense: Weights, pruned: Weights, recovered: Weights | None = None) -> Summary:
    import saap

    config = step.config()
    dtype, device = config.pop("dtype"), compute_settings(step)["device"]
    config.pop("machine")
    target = config.pop("target", None)
    in_llama_cpp = config.pop("llama_cpp")
    forget_model()
    given = {"dense": dense, "pruned": pruned, "recovered": recovered}
    places = {name: weights.place for name, weights in given.items() if weights is not None}
    models = {name: saap.load(place, dtype=dtype, device=device) for name, place in places.items()}
    sizes = {name: saap.size_of(model) for name, model in models.items()}
    for model in models.values():
        saap.use_int4_kernels(model)
    rows = saap.compare_speed(models, sizes, **config)
    if in_llama_cpp:
        from saap.export.llama_cpp_speed import llama_cpp_speed

        models.clear()
        rows += llama_cpp_speed(places, sizes, **config)
    write_table(folder, "speed", [asdict(row) for row in rows])
    summary = {row.variant: f"{row.tokens_per_s:.1f} tokens/s" for row in rows}
    if target is not None:
        summary["of_target"] = checked(target, next(row.decode_ratio for row in rows if row.variant == "pruned"))
    return summary


def checked(target: str, found: float) -> str:
    """The speed of the pruned model beside its target, with a warning where they differ."""
    _, wanted = parse_target(target)
    said = f"{found:.2f}x of {target}"
    if abs(found / wanted - 1) > OFF:
        logging.getLogger("saap").warning(
            "the pruned model decodes %.2f times as fast as the dense one, prune.target asks for %s", found, target
        )
    return said


def machine_name(device: str, threads: int | None) -> str:
    """What a speed was measured on: part of its key, and of nothing else's. Read without torch."""
    names = [device, str(threads or os.environ.get("OMP_NUM_THREADS") or _cores())]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                names.append(line.partition(":")[2].strip())
                break
    except OSError:
        pass
    for gpu in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.partition(":")[2].strip() for line in gpu.read_text().splitlines() if line.startswith("Model")]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names.append(f"CUDA_VISIBLE_DEVICES={visible}")
    return ", ".join(names)


def _cores() -> int | None:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
