"""How much the importance of each group fluctuates, and the stability indicator made of it."""

from pathlib import Path
from typing import Any

from storage.tables import read_samples, write_table
from tasks.compute import checkpoint
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("fluctuation")
def fluctuation(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    config = step.config()
    model, _ = checkpoint(step, "model", use="blocks")
    groups, norms = saap.discover(model), saap.weight_norms(model)
    fused = read_samples(step.folder("fused"), "fused")["fused"]
    moved = saap.fluctuation(fused, norms, fluctuation=config["fluctuation"])
    asi = saap.asi(moved, groups, asi_scope=config["asi_scope"])
    write_table(
        folder,
        "groups",
        {
            **vars(groups),
            "weight_norm_sq": norms,
            "mean_fused": fused.mean(0),
            "fluctuation": moved,
            "asi": asi,
            "rank_score": asi,
        },
    )
    return {"groups": len(groups)}
