"""Train the pruned model back, by one of the recipes."""

import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from storage.artifacts import ArtifactStore
from storage.keys import digest
from storage.tables import write_table
from tasks.artifact import Source
from tasks.compute import compute_settings
from tasks.data import read_data
from tasks.inputs import Checkpoint, Data, forget_model
from tasks.model_card import write_card
from tasks.outside import Outside
from tasks.stage import Summary, dtype_of, stage
from tasks.step import Step


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    return digest([outside.model.weights if "teacher" in inputs else None, outside.data("recovery")])


@stage(
    version=5,
    publishes=Checkpoint,
    params=lambda config: config.recover.model_dump() | dtype_of(config),
    fingerprint=_fingerprint,
)
def recover(
    step: Step, folder: Path, *, teacher: Checkpoint | None = None, checkpoint: Checkpoint, data: Data
) -> Summary:
    from saap import RECIPES, Training
    from saap.recovery.launch import Job, run, run_launched

    config, compute = step.config(), compute_settings(step)
    forget_model()
    recipe = RECIPES[config["recipe"]]
    job = Job(
        checkpoint=str(checkpoint.place),
        tokenizer=str(step.place("tokenizer")),
        teacher=None if teacher is None else str(teacher.place),
        rows=read_data(data.name, "recovery")[: config["examples"]],
        work=str(ArtifactStore(step.store).work(step.stage, step.key)),
        output=str(folder),
        recipe=config["recipe"],
        options={f.name: config[f.name] for f in fields(recipe)},
        training={f.name: config[f.name] for f in fields(Training)},
        dtype=config["dtype"],
        device=compute["device"],
    )
    steps = run_launched(job, compute["launch"]) if compute["launch"] else run(job)
    shutil.copy(checkpoint.place / "plan.parquet", folder)
    write_card(step, folder)
    write_table(folder, "training", steps)
    summary = {"steps": steps[-1]["step"]}
    for name in ("loss", "held_out_loss"):
        values = [round(row[name], 4) for row in steps if row[name] is not None]
        summary |= {f"first_{name}": values[0], f"last_{name}": values[-1]} if values else {}
    return summary
