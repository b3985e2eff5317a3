"""A criterion puts the groups in order."""

from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import checkpoint
from tasks.criteria import NEEDS
from tasks.stage import stage_task
from tasks.statistics import read_statistic
from tasks.step import Step


@stage_task("rank")
def rank(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    config = step.config()
    name, needs = config["criterion"], NEEDS[config["criterion"]]
    trained = needs.statistics == ("tokens",)  # slices suffice the others; with offload they stay on the CPU
    model, _ = checkpoint(step, "model", use="whole" if trained else "slices")
    statistics = {statistic: read_statistic(step, statistic) for statistic in needs.statistics}
    options = {option: config[option] for option in needs.options}
    groups = saap.discover(model)
    score = saap.CRITERIA[name](model, **statistics, **options)
    unknown = dict.fromkeys(("weight_norm_sq", "mean_fused", "fluctuation", "asi"), [None] * len(groups))
    write_table(folder, "groups", {**vars(groups), "rank_score": score, **unknown})
    return {"groups": len(groups)}
