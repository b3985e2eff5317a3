"""Decide which groups stay, write that down, then cut."""

from pathlib import Path
from typing import Any

from storage.tables import read_table, write_table
from tasks.card import write_card
from tasks.compute import calibration_tokens, checkpoint, settings
from tasks.stage import stage_task
from tasks.statistics import read_statistic
from tasks.step import Step


@stage_task("prune")
def prune(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    config = step.config()
    model, tokenizer = checkpoint(step, "model", use="slices")
    groups = saap.discover(model)
    keep = saap.select(
        read_table(step.folder("groups"), "groups")["rank_score"],
        groups,
        config["ratio"],
        search=config["search"],
        direction=config["direction"],
        kinds=config["kinds"],
        protect=tuple(config["protect"]),
        align=config["align"],
    )
    write_table(folder, "plan", {"layer": groups.layer, "kind": groups.kind, "unit": groups.unit, "kept": keep})
    write_table(
        folder,
        "widths",
        [
            {
                "layer": layer,
                "kind": kind,
                "units": len(index),
                "kept": int(keep[index].sum()),
                "parameters": int(groups.parameters[index].sum()),
                "kept_parameters": int(groups.parameters[index][keep[index]].sum()),
            }
            for layer, kind, index in groups.blocks()
        ],
    )
    small = saap.prune(model, keep)
    if config["compensation"] == "bias":
        saap.add_mean_bias(small, model, keep, read_statistic(step, "activations"))
    elif config["compensation"] == "least_squares":
        saap.refit(small, model, keep, calibration_tokens(step), batch_size=settings(step)["batch_size"])
    saap.save(small, folder, tokenizer)
    write_card(step, folder)
    parameters = saap.size_of(small).parameters
    return {
        "removed_of_prunable": round(saap.removed_share(groups, keep), 6),
        "parameters": parameters,
        "of_total": round(1 - parameters / saap.size_of(model).parameters, 6),
    }
