"""Decide which groups stay, record the plan, then prune."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.keys import digest
from storage.tables import write_table
from tasks.artifact import Source
from tasks.compute import compute_settings
from tasks.config import RunConfig
from tasks.inputs import Checkpoint, load_model, load_tokenizer
from tasks.model_card import write_card
from tasks.outside import Outside
from tasks.stage import Summary, groups_of, stage
from tasks.stages.activations import Activations
from tasks.stages.calibrate import Calibration
from tasks.stages.layer_times import LayerTimes
from tasks.stages.rank import Ranking
from tasks.step import Step
from tasks.target import aim_of
from tasks.toml import ConfigError
from tasks.values import parse_target

WORTH_SAYING = 0.1  # of the ratio: what is removed may be so far from it


def prune_params(config: RunConfig) -> dict[str, Any]:
    """The prune section, 'auto' replaced by what the criterion was published with."""
    params = config.settled().prune.model_dump(mode="json", exclude={"heads", "target"})
    if params["compensation"] != "least_squares":
        del params["ridge"]
    return params | groups_of(config) | _target(config)


def _target(config: RunConfig) -> dict[str, Any]:
    """The target, and where it is of bytes the form of what the run ends with, if that is in codes."""
    cut, recover = config.prune, config.recover
    if cut.target is None:
        return {}
    if parse_target(cut.target)[0] != "bytes" or recover.recipe != "groupwise":
        return {"target": cut.target}
    scales = {"groups": recover.groups} if recover.groups else {"group_size": recover.group_size}
    return {"target": cut.target, "form": {"bits": recover.bits, **scales}}


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    model = outside.model
    return digest([model.weights, model.tokenizer, *([model.extras] if model.extras else [])])


def check_removed(keep: Any, params: dict[str, Any]) -> None:
    """Raises ConfigError for a plan in which every group stays. params: those of the stage."""
    if keep.all():
        wanted = f"target = '{params['target']}'" if "target" in params else f"ratio = {params['ratio']}"
        raise ConfigError(
            f"prune.{wanted} removes nothing in steps of prune.align = {params['align']} channels: remove more, "
            "or lower align"
        )


def say_if_far(removed: float, params: dict[str, Any]) -> None:
    """A line where what is removed is not about the ratio. A target is checked by itself. params: the stage's."""
    if "target" not in params and abs(removed / params["ratio"] - 1) > WORTH_SAYING:
        logging.getLogger("saap").warning(
            "%.3g of the prunable parameters are removed, prune.ratio asks for %.3g: layers lose whole heads, and "
            "channels in steps of prune.align = %d, so a lower align comes nearer",
            *(removed, params["ratio"], params["align"]),
        )


@stage(version=5, publishes=Checkpoint, params=prune_params, fingerprint=_fingerprint)
def prune(
    step: Step,
    folder: Path,
    *,
    model: Checkpoint,
    groups: Ranking,
    activations: Activations | None = None,
    calibration: Calibration | None = None,
    layer_times: LayerTimes | None = None,
) -> Summary:
    import saap

    config = step.config()
    dense = load_model(step, model, use="slices")
    found = saap.discover(dense)
    options = {name: config[name] for name in ("search", "direction", "kinds", "align")}
    options["protect"] = tuple(config["protect"])
    if "target" in config:
        aim = aim_of(config, dense, found, None if layer_times is None else layer_times.read())
        keep, _ = saap.select_for(groups.read(), found, aim.size, aim.wanted, **options)
    else:
        keep = saap.select(groups.read(), found, config["ratio"], **options)
    check_removed(keep, config)
    write_table(folder, "plan", {"layer": found.layer, "kind": found.kind, "unit": found.unit, "kept": keep})
    write_table(folder, "widths", _widths(found, keep))
    small = saap.prune(dense, keep)
    if activations is not None:
        saap.add_mean_bias(small, dense, keep, activations.read())
    elif calibration is not None:
        batch = compute_settings(step)["batch_size"]
        saap.refit(small, dense, keep, calibration.read(), ridge=config["ridge"], batch_size=batch)
    saap.save(small, folder, load_tokenizer(step))
    size = saap.size_of(small)
    active = {} if size.active == size.parameters else {"active_parameters": size.active}
    removed = saap.removed_share(found, keep)
    summary = {
        **({"target": config["target"]} if "target" in config else {}),
        "removed_of_prunable": round(removed, 6),
        "parameters": size.parameters,
        **active,
        "of_total": round(1 - size.parameters / saap.size_of(dense).parameters, 6),
    }
    say_if_far(removed, config)
    write_card(step, folder, summary)
    return summary


def _widths(groups: Any, keep: Any) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "kind": kind,
            "units": len(index),
            "kept": int(keep[index].sum()),
            "parameters": int(groups.parameters[index].sum()),
            "kept_parameters": int(groups.parameters[index][keep[index]].sum()),
        }
        for layer, kind, index in groups.structures()
    ]
