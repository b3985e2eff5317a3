"""From `prune.target` to the ratio, before the steps of a run are known. Imports torch only inside the functions."""

import json
from functools import lru_cache
from typing import Any

from flows.checks import facts_of
from flows.dag import timing_steps
from storage.artifacts import ArtifactStore
from storage.runs import arriving
from tasks.config import ConfigError, RunConfig, wrong_combination
from tasks.model_source import ModelSource
from tasks.outside import Outside
from tasks.stages.layer_times import LayerTimes
from tasks.stages.prune import prune_params

Measured = tuple[tuple[str, float, float], ...]


class NotTimed(ConfigError):
    """A target of speed, and the layers have not been timed."""


def with_ratio(settings: RunConfig, outside: Outside, run_id: str = "", *, look_only: bool = False) -> RunConfig:
    """The configuration with the ratio that meets its target, if it has one.

    Criteria rank at a ratio, so it must be known before they do: it is that of a plan with random scores. The prune
    stage has the true ones, and meets the target to a step of channels. A target of speed has the layers timed first,
    here, unless the store has the times; with look_only NotTimed is raised.
    Raises ConfigError for a target that cannot be met; it says which could be.
    """
    if settings.prune.target is None:
        return settings
    measured = _layer_times(settings, outside, run_id, look_only) if settings.prune.target_is_speed else None
    ratio = _ratio(outside.model, settings.prune.heads, json.dumps(prune_params(settings)), measured)
    found = settings.model_copy(update={"prune": settings.prune.model_copy(update={"ratio": ratio})})
    if wrong := wrong_combination(found):
        raise ConfigError(f"at the ratio {ratio:g}, found for prune.target = '{settings.prune.target}': {wrong}")
    return found


@lru_cache(maxsize=256)
def _ratio(source: ModelSource, heads: str, params_: str, measured: Measured | None) -> float:
    """Rounded down to four digits: what tables show is what was used."""
    import numpy as np

    from saap import OutOfReach, select_for
    from tasks.target import aim_of

    params: dict[str, Any] = json.loads(params_)
    facts = facts_of(source, heads)
    groups = facts.groups
    aim = aim_of(params, facts.model, groups, measured)
    options = {name: params[name] for name in ("search", "direction", "kinds", "align")}
    options["protect"] = tuple(params["protect"])
    score, dense = np.random.default_rng(0).random(len(groups)), aim.size(np.ones(len(groups), bool))
    try:
        _, ratio = select_for(score, groups, aim.size, aim.wanted if aim.wanted < dense else 0.0, **options)
    except OutOfReach as error:
        there = f"from {aim.say(error.smallest, smallest=True)} to below the dense model's {aim.say(dense)}"
        if aim.what == "speed":
            there = f"up to {aim.say(error.smallest, smallest=True)}"
        raise ConfigError(
            f"prune.target = '{params['target']}' is out of reach: with these settings it can be {there}"
        ) from error
    return max(int(ratio * 1e4) / 1e4, 1e-4)


def _layer_times(settings: RunConfig, outside: Outside, run_id: str, look_only: bool) -> Measured:
    steps, store = timing_steps(settings, run_id, outside), ArtifactStore(settings.store)
    last = steps[-1]
    if store.inspect(last.stage, last.key)[0] is None:
        if look_only:
            raise NotTimed(
                f"prune.target = '{settings.prune.target}': how long the layers of this model take on this machine is "
                "not known; `saap run` and `saap sweep` time them first"
            )
        from tasks.inputs import forget_model
        from tasks.running import find_or_publish
        from tasks.stage import stage_named

        store.prepare()
        with arriving(store.root, run_id):  # gc must not take what this run has made before its record
            for step in steps:
                find_or_publish(stage_named(step.stage), step)
        forget_model()
    return tuple(LayerTimes(store.path(last.stage, last.key)).read())
