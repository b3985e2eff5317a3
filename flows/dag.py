"""From a configuration to the stages of a run, each with its key. Imports neither torch nor Prefect."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.keys import Fingerprints, digest
from tasks.config import ACCURACIES, RunConfig
from tasks.criteria import NEEDS, SAAP
from tasks.data import MissingData, data_fingerprint
from tasks.model_source import model_source
from tasks.step import Step

# raise a stage's number when its code starts to give other results: its artifacts, and all after them, are made anew
VERSIONS = {
    "model": 2,
    "calibrate": 1,
    "score": 2,
    "fuse": 1,
    "fluctuation": 2,
    "gradients": 2,
    "activations": 1,
    "fisher": 2,
    "rank": 2,
    "prune": 3,
    "recover": 4,
    "evaluate": 2,
    "speed": 2,
}

Reference = tuple[str, str]  # (stage, key) of an artifact


def build(config: RunConfig, run_id: str = "") -> list[Step]:
    """The steps of a run in an order they can run in.

    A key is a digest of: stage and its code version, its own part of the config, the keys of the artifacts it takes,
    and fingerprints of what comes from outside. Not the run, the time, a path, or the compute section.
    A benchmark whose data is missing is a step that says so; its key is another once the data is there.
    Raises ConfigError or StorageError for a model, calibration or recovery data that is not there.
    """
    store = Path(config.store).resolve()
    fingerprints = Fingerprints(store)
    source = model_source(config.model.path, config.model.revision, fingerprints)
    data = config.data if config.data in ("mini", "hub") else str(Path(config.data).resolve())
    dtype = config.model.dtype
    steps: list[Step] = []

    def add(
        stage: str,
        params: dict[str, Any],
        inputs: dict[str, Reference | None],
        outside: dict[str, str],
        fingerprint: str | None = None,
        **labels: str | None,
    ) -> Reference:
        artifacts = tuple((name, *reference) for name, reference in inputs.items() if reference)
        key = digest([stage, VERSIONS[stage], params, artifacts, fingerprint])
        steps.append(
            Step(
                stage=stage,
                key=key,
                params=json.dumps(params, sort_keys=True),
                inputs=artifacts,
                outside=tuple(outside.items()),
                compute=config.compute.model_dump_json(),
                store=str(store),
                run_id=run_id,
                **labels,
            )
        )
        return stage, key

    def fingerprint_of(role: str) -> str:
        return data_fingerprint(data, role, fingerprints)

    def found_or_missing(role: str) -> tuple[str | None, str | None]:
        """The fingerprint of a benchmark's data, or why there is none."""
        try:
            return fingerprint_of(role), None
        except MissingData as missing:
            return None, str(missing)

    dense: Reference | None = None
    if source.kind == "gguf":
        dense = add("model", {}, {}, {"gguf": str(source.path)}, source.weights)

    def of_model(name: str) -> tuple[dict[str, Reference | None], dict[str, str]]:
        """The dense model and its tokenizer as inputs: an artifact, or a folder outside the store."""
        if dense is not None:
            return {name: dense, "tokenizer": dense}, {}
        return {}, {name: str(source.path.resolve()), "tokenizer": str(source.path.resolve())}

    inputs, outside = of_model("model")
    outside_data = {"data": data}
    calibration = add(
        "calibrate",
        config.calibrate.model_dump(),
        {"tokenizer": inputs.get("tokenizer")},
        {**({"tokenizer": outside["tokenizer"]} if outside else {}), **outside_data},
        digest([source.tokenizer, fingerprint_of("calibration")]),
    )
    made: dict[str, Reference] = {"tokens": calibration}

    def statistic(name: str) -> Reference:
        """The stage that publishes it, added on first use: what two need is computed once."""
        if name not in made:
            params = config.score.model_dump() if name == "score" else {}
            made[name] = add(
                name, {**params, "dtype": dtype}, {**inputs, "calibration": calibration}, outside, source.weights
            )
        return made[name]

    criterion = config.criterion.name
    needs = SAAP if criterion == "saap" else NEEDS[criterion]
    if criterion == "saap":
        fused = add("fuse", config.fuse.model_dump(), {"importance": statistic("score")}, {})
        groups = add(
            "fluctuation",
            {**config.fluctuation.model_dump(), "dtype": dtype},
            {**inputs, "fused": fused},
            outside,
            source.weights,
        )
    else:
        known = {**config.criterion.model_dump(), **config.prune.model_dump(), "seed": config.calibrate.seed}
        known["cuts"] = [cut for cut in sorted(config.criterion.cuts) if cut < config.prune.ratio]
        groups = add(
            "rank",
            {"criterion": criterion, "dtype": dtype, **{option: known[option] for option in needs.options}},
            {**inputs, **{"calibration" if s == "tokens" else s: statistic(s) for s in needs.statistics}},
            outside,
            source.weights,
        )
    cut = config.prune.model_dump(mode="json")
    cut |= {field: getattr(needs, field) for field in ("search", "compensation") if cut[field] == "auto"}
    pruned = add(
        "prune",
        {**cut, "dtype": dtype},
        {
            **inputs,
            "groups": groups,
            **({"activations": statistic("activations")} if cut["compensation"] == "bias" else {}),
            **({"calibration": calibration} if cut["compensation"] == "least_squares" else {}),
        },
        outside,
        digest([source.weights, source.tokenizer]),
    )
    variants: dict[str, Reference | None] = {"dense": dense, "pruned": pruned}
    if config.recover.recipe != "none":
        distilled = config.recover.distill > 0
        teacher, teacher_folder = of_model("teacher") if distilled else ({}, {})
        variants["recovered"] = add(
            "recover",
            {**config.recover.model_dump(), "dtype": dtype},
            {**teacher, "checkpoint": pruned, "tokenizer": pruned},
            {**teacher_folder, **outside_data},
            digest([source.weights if distilled else None, fingerprint_of("recovery")]),
        )
    sets = {benchmark: found_or_missing(benchmark) for benchmark in config.evaluate.benchmarks}
    for variant, reference in variants.items():
        if variant not in config.evaluate.variants:
            continue
        for benchmark in config.evaluate.benchmarks:
            options = config.evaluate
            params: dict[str, Any] = {"benchmark": benchmark, "dtype": dtype}
            if benchmark in ACCURACIES:
                params |= {"limit": options.limit, "samples": options.samples, "harness": version("lm-eval")}
            else:
                params |= {"windows": list(options.windows), "max_tokens": options.max_tokens}
            if reference is None:
                its_inputs, its_outside = of_model("checkpoint")
            else:
                its_inputs, its_outside = {"checkpoint": reference, "tokenizer": reference}, {}
            found, missing = sets[benchmark]
            add(
                "evaluate",
                params,
                its_inputs,
                {**its_outside, **outside_data},
                digest([source.weights if reference is None else None, found]),
                variant=variant,
                benchmark=benchmark,
                missing=missing,
            )
    if config.speed.runs:
        add(
            "speed",
            {
                **config.speed.model_dump(),
                "dtype": dtype,
                "machine": machine(config.compute.device, config.compute.threads),
            },
            dict(variants),
            {} if dense else {"dense": str(source.path.resolve())},
            source.weights,
        )
    return steps


def machine(device: str, threads: int | None) -> str:
    """What a speed was measured on: part of its key, and of nothing else's. Read without torch."""
    names = [device, str(threads or os.cpu_count())]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                names.append(line.partition(":")[2].strip())
                break
    except OSError:
        pass
    for gpu in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.partition(":")[2].strip() for line in gpu.read_text().splitlines() if line.startswith("Model")]
    return ", ".join(names)
