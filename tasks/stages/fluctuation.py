"""How much the importance of each group fluctuates, and the stability indicator made of it."""

from pathlib import Path

from storage.tables import write_table
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.fuse import Fused
from tasks.stages.rank import Ranking
from tasks.step import Step


@stage(
    version=2,
    publishes=Ranking,
    params=lambda config: config.fluctuation.model_dump() | groups_of(config),
    fingerprint=weights_of,
)
def fluctuation(step: Step, folder: Path, *, model: Checkpoint, fused: Fused) -> Summary:
    import saap

    config, importance = step.config(), fused.read()
    dense = load_model(step, model, use="layers")
    groups, norms = saap.discover(dense), saap.weight_norms(dense)
    moved = saap.fluctuation(importance, norms, fluctuation=config["fluctuation"])
    asi = saap.asi(moved, groups, asi_scope=config["asi_scope"])
    write_table(
        folder,
        "groups",
        {
            **vars(groups),
            "weight_norm_sq": norms,
            "mean_fused": importance.mean(0),
            "fluctuation": moved,
            "asi": asi,
            "rank_score": asi,
        },
    )
    return {"groups": len(groups)}
