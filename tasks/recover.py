"""Train the pruned model back, by one of the recipes."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from storage.artifacts import ArtifactStore
from storage.tables import write_table
from tasks.card import write_card
from tasks.compute import forget, settings
from tasks.data import read_data
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("recover")
def recover(step: Step, folder: Path) -> dict[str, Any]:
    from saap import RECIPES, Training
    from saap.recovery.launch import Job, launched, run

    config, compute = step.config(), settings(step)
    forget()
    recipe = RECIPES[config["recipe"]]
    job = Job(
        checkpoint=str(step.folder("checkpoint")),
        tokenizer=str(step.folder("tokenizer")),
        teacher=str(step.folder("teacher")) if config["distill"] else None,
        rows=read_data(step.outside_value("data"), "recovery")[: config["examples"]],
        work=str(ArtifactStore(step.store).work(step.stage, step.key)),
        output=str(folder),
        recipe=config["recipe"],
        options={f.name: config[f.name] for f in fields(recipe)},
        training={f.name: config[f.name] for f in fields(Training)},
        dtype=config["dtype"],
        device=compute["device"],
    )
    steps = launched(job, compute["launch"]) if compute["launch"] else run(job)
    shutil.copy(step.folder("checkpoint") / "plan.parquet", folder)
    write_card(step, folder)
    write_table(folder, "training", steps)
    summary = {"steps": steps[-1]["step"]}
    for name in ("loss", "held_out_loss"):
        values = [round(row[name], 4) for row in steps if row[name] is not None]
        summary |= {f"first_{name}": values[0], f"last_{name}": values[-1]} if values else {}
    return summary
