"""Train the pruned model back, by one of the recipes."""

import gc
import random
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from storage.artifacts import ArtifactStore
from storage.keys import digest
from storage.tables import write_table
from tasks.artifact import Source
from tasks.compute import MEMORY, compute_settings
from tasks.config import RunConfig
from tasks.data import read_data
from tasks.inputs import Checkpoint, Data, forget_model, load_tokenizer
from tasks.model_card import write_card
from tasks.outside import Outside
from tasks.recovery import check_rows
from tasks.stage import Summary, dtype_of, stage
from tasks.stages.calibrate import Calibration
from tasks.step import Step


def _params(config: RunConfig) -> dict[str, object]:
    """What this recipe reads: other settings leave its result alone."""
    unused = {name for name in ("prose", "own", "minutes") if not getattr(config.recover, name)}
    unused |= set() if config.recover.recipe == "groupwise" else {"bits", "group_size", "groups", "rounding"}
    unused |= {"epochs"} if config.recover.minutes else set()
    unused |= {"choose"} if not config.recover.instructions else set()
    return config.recover.model_dump(exclude={*MEMORY, *unused, "prose_from"}) | dtype_of(config)


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    teacher = outside.model.weights if "teacher" in inputs else None
    return digest([teacher, outside.data("recovery") if "data" in inputs else None])


def _rows(step: Step, data: Data | None, text: Calibration | None) -> list[dict[str, Any]]:
    """Alpaca's rows, with those of tokens among them."""
    from saap.texts import chosen_rows

    config = step.config()
    tokens = [] if text is None else text.read().tolist()
    rows = [] if data is None else read_data(data.name, "recovery")
    count = len(rows) if config["examples"] is None else config["examples"]
    if data is not None:
        check_rows(count, len(tokens), len(rows))
    longest = config.get("choose") == "long"
    if config["examples"] is not None:
        about = {"longest": longest, "whole_text": config["loss_on"] == "text"}
        rows = chosen_rows(rows, count - len(tokens), load_tokenizer(step), config["max_length"], **about)
    else:
        rows = rows[: count - len(tokens)]
    rows += [{"tokens": ids} for ids in tokens]
    if tokens or longest:
        random.Random(config["seed"]).shuffle(rows)  # the last ones are held out
    return rows


@stage(
    version=11,
    publishes=Checkpoint,
    params=_params,
    fingerprint=_fingerprint,
)
def recover(
    step: Step,
    folder: Path,
    *,
    teacher: Checkpoint | None = None,
    checkpoint: Checkpoint,
    data: Data | None = None,
    text: Calibration | None = None,
) -> Summary:
    from saap import RECIPES, Training
    from saap.recovery.launch import Job, run, run_launched

    config, compute = step.config(), compute_settings(step)
    settings = config | {name: compute[name] for name in MEMORY}
    forget_model()
    recipe = RECIPES[config["recipe"]]
    job = Job(
        checkpoint=str(checkpoint.place),
        tokenizer=str(step.place("tokenizer")),
        teacher=None if teacher is None else str(teacher.place),
        rows=_rows(step, data, text),
        work=str(ArtifactStore(step.store).work(step.stage, step.key)),
        output=str(folder),
        recipe=config["recipe"],
        options={f.name: config[f.name] for f in fields(recipe)},
        training={f.name: settings[f.name] for f in fields(Training) if f.name in settings},
        dtype=config["dtype"],
        device=compute["device"],
    )
    steps = run_launched(job, compute["launch"]) if compute["launch"] else run(job)
    gc.collect()  # the trainer and what it knows refer to each other, and to both models
    shutil.copy(checkpoint.place / "plan.parquet", folder)
    write_card(step, folder)
    write_table(folder, "training", steps)
    summary = {"steps": steps[-1]["step"]}
    loss, held_out = ([row[name] for row in steps if row[name] is not None] for name in ("loss", "held_out_loss"))
    summary |= {"first_loss": round(loss[0], 4), "last_loss": round(loss[-1], 4)}
    if held_out:
        summary |= {"first_held_out_loss": round(held_out[0], 4), "best_held_out_loss": round(min(held_out), 4)}
    return summary
