"""From a configuration to the steps of a run, each with its key. Imports neither torch nor Prefect."""

import json
from pathlib import Path

from storage.keys import digest
from tasks.artifact import Source
from tasks.compute import compute_of
from tasks.config import RunConfig
from tasks.criteria import needs_of
from tasks.inputs import Checkpoint, Data, Gguf
from tasks.outside import Outside
from tasks.recovery import check_rows, counts
from tasks.stage import Stage
from tasks.stages.activations import activations
from tasks.stages.calibrate import calibrate
from tasks.stages.evaluate import evaluate
from tasks.stages.fisher import fisher
from tasks.stages.fluctuation import fluctuation
from tasks.stages.fuse import fuse
from tasks.stages.gradients import gradients
from tasks.stages.layer_times import layer_times
from tasks.stages.model import model
from tasks.stages.own_text import own_text
from tasks.stages.prune import prune, prune_params
from tasks.stages.rank import rank
from tasks.stages.recover import recover
from tasks.stages.recovery_text import recovery_text
from tasks.stages.score import score
from tasks.stages.speed import speed
from tasks.step import Step

STATISTICS = {stage.name: stage for stage in (score, gradients, activations, fisher)}


def build(config: RunConfig, run_id: str = "", outside: Outside | None = None) -> list[Step]:
    """The steps of a run in an order they can run in. `outside`: what was looked at already for this configuration.

    A target stands beside the ratio that was found for it (`with_ratio`).
    A benchmark whose data is missing is a step that says so; its key is another once the data is there.
    Raises ConfigError or StorageError for a model, calibration or recovery data that is not there.
    """
    graph = Graph(config, run_id, outside or Outside(config))
    dense = _dense(graph)
    times = graph.add(layer_times, model=dense) if config.prune.target_is_speed else None
    calibration = graph.add(calibrate, tokenizer=dense, data=graph.data("calibration"))
    recovers = config.recover.recipe != "none"
    text = _recovery_text(graph, dense) if recovers else {}  # before what is long: there may be too little of it
    if config.settled().calibrate.own:
        calibration = graph.add(own_text, model=dense, calibration=calibration)
    pruned = _prune(graph, dense, calibration, times)
    variants = {"dense": dense, "pruned": pruned}
    if recovers:
        teacher = dense if config.recover.distill > 0 else None
        variants["recovered"] = graph.add(recover, teacher=teacher, checkpoint=pruned, **text)
    for variant in (name for name in variants if name in config.evaluate.variants):
        for benchmark in config.evaluate.benchmarks:
            graph.add(evaluate, variant, benchmark, checkpoint=variants[variant], data=graph.data(benchmark))
    if config.speed.runs:
        graph.add(speed, **variants)
    return graph.steps


def timing_steps(config: RunConfig, run_id: str, outside: Outside) -> list[Step]:
    """The steps of `build` up to the times of layers, which a target of speed needs before the others are known."""
    graph = Graph(config, run_id, outside)
    graph.add(layer_times, model=_dense(graph))
    return graph.steps


def _dense(graph: "Graph") -> Source:
    source = graph.outside.model
    if source.kind == "gguf":
        return graph.add(model, gguf=Source(Gguf, path=str(source.path)))
    return Source(Checkpoint, path=str(source.path.resolve()))


def _prune(graph: "Graph", dense: Source, calibration: Source, times: Source | None) -> Source:
    """Rank by the configured criterion, then prune. A statistic that two stages need is computed once."""
    made: dict[str, Source] = {}

    def statistic(name: str) -> Source:
        if name not in made:
            made[name] = graph.add(STATISTICS[name], model=dense, calibration=calibration)
        return made[name]

    criterion = graph.config.criterion.name
    if criterion == "saap":
        fused = graph.add(fuse, importance=statistic("score"))
        groups = graph.add(fluctuation, model=dense, fused=fused)
    else:
        wanted = needs_of(criterion).statistics
        statistics = {name: statistic(name) for name in wanted if name != "tokens"}
        groups = graph.add(rank, model=dense, **statistics, calibration=calibration if "tokens" in wanted else None)
    compensation = prune_params(graph.config)["compensation"]
    return graph.add(
        prune,
        model=dense,
        groups=groups,
        activations=statistic("activations") if compensation == "bias" else None,
        calibration=calibration if compensation == "least_squares" else None,
        layer_times=times,
    )


def _recovery_text(graph: "Graph", dense: Source) -> dict[str, Source | None]:
    """The instruction rows and the other text to recover on. Raises ConfigError for fewer rows than are asked for."""
    settings, text = graph.config.recover, None
    instructions = graph.data("recovery") if settings.prose + settings.own < 1 else None
    rows = None if instructions is None else graph.outside.rows("recovery")
    if settings.examples is not None and rows is not None:
        check_rows(settings.examples, sum(counts(settings.shares, settings.examples).values()), rows)
    if settings.prose or settings.own:
        text = graph.add(
            recovery_text,
            tokenizer=dense,
            model=dense if settings.own else None,
            data=graph.data("prose") if settings.prose else None,
            instructions=instructions if settings.examples is None else None,
        )
    return {"data": instructions, "text": text}


class Graph:
    """Collects the steps of a run."""

    def __init__(self, config: RunConfig, run_id: str, outside: Outside) -> None:
        self.config, self.run_id = config, run_id
        self.outside = outside
        self.steps: list[Step] = []

    def data(self, role: str) -> Source:
        return Source(Data, path=self.outside.place(role))

    def add(
        self, stage: Stage, variant: str | None = None, benchmark: str | None = None, /, **inputs: Source | None
    ) -> Source:
        """Add a step and return what it publishes.

        Its key is a digest of: stage and its code version, its own part of the config, the keys of the artifacts it
        takes, and fingerprints of what comes from outside. Not the run, the time, a path, or the compute section.
        """
        given = {name: source for name, source in inputs.items() if source is not None}
        stage.check(given)
        labels = {} if benchmark is None else {"benchmark": benchmark}
        params = stage.params(self.config, **labels)
        artifacts: dict[str, tuple[str, str]] = {}
        outside: dict[str, str] = {}
        for name, source in given.items():
            for place in (name, "tokenizer") if stage.takes[name] is Checkpoint else (name,):
                if source.key:
                    artifacts[place] = source.stage, source.key
                else:
                    outside[place] = source.path
        taken = tuple((name, *reference) for name, reference in artifacts.items())
        fingerprint = stage.fingerprint(self.outside, given, **labels)
        key = digest([stage.name, stage.version, params, taken, fingerprint])
        self.steps.append(
            Step(
                stage=stage.name,
                key=key,
                params=json.dumps(params, sort_keys=True),
                inputs=taken,
                outside=tuple(outside.items()),
                compute=compute_of(self.config),
                store=str(Path(self.config.store).resolve()),
                store_remote=self.config.store_remote,
                run_id=self.run_id,
                variant=variant,
                benchmark=benchmark,
                missing=None if benchmark is None else self.outside.missing(benchmark),
                looked_at=self.outside.looked_at(set(outside.values())),
            )
        )
        return Source(stage.publishes, stage=stage.name, key=key)
