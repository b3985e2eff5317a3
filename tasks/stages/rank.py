"""A criterion puts the groups in order."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.tables import read_table, write_table
from tasks.artifact import Artifact
from tasks.config import RunConfig
from tasks.criteria import needs_of
from tasks.inputs import Checkpoint, load_model
from tasks.stage import Summary, groups_of, stage, weights_of
from tasks.stages.activations import Activations
from tasks.stages.calibrate import Calibration
from tasks.stages.fisher import Fisher
from tasks.stages.gradients import Taylor
from tasks.stages.score import Importance
from tasks.step import Step


class Ranking(Artifact):
    """groups.parquet."""

    def read(self) -> np.ndarray:
        """The score that groups are removed by, lowest first; float64 (groups,)."""
        return read_table(self.place, "groups")["rank_score"]


def _params(config: RunConfig) -> dict[str, Any]:
    """The criterion's own options only: another option leaves its ranking alone."""
    known = {**config.criterion.model_dump(), **config.prune.model_dump(), "seed": config.calibrate.seed}
    known["cuts"] = config.criterion.cuts_for(config.prune.ratio)
    options = {option: known[option] for option in needs_of(config.criterion.name).options}
    return {"criterion": config.criterion.name} | groups_of(config) | options


@stage(version=5, publishes=Ranking, params=_params, fingerprint=weights_of)
def rank(
    step: Step,
    folder: Path,
    *,
    model: Checkpoint,
    calibration: Calibration | None = None,
    score: Importance | None = None,
    gradients: Taylor | None = None,
    activations: Activations | None = None,
    fisher: Fisher | None = None,
) -> Summary:
    import saap

    config = step.config()
    name, needs = config["criterion"], needs_of(config["criterion"])
    given: dict[str, Artifact | None] = {"score": score, "gradients": gradients, "activations": activations}
    given |= {"fisher": fisher, "tokens": calibration}
    statistics = {what: published.read() for what, published in given.items() if published is not None}
    trained = needs.statistics == ("tokens",)  # slices suffice the others; with offload they stay on the CPU
    dense = load_model(step, model, use="whole" if trained else "slices")
    groups = saap.discover(dense)
    ranked = saap.CRITERIA[name](dense, **statistics, **{option: config[option] for option in needs.options})
    unknown = dict.fromkeys(("weight_norm_sq", "mean_fused", "fluctuation", "asi"), [None] * len(groups))
    write_table(folder, "groups", {**vars(groups), "rank_score": ranked, **unknown})
    return {"groups": len(groups)}
