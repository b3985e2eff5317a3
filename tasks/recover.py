"""Train the pruned model back as an int4 model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.artifacts import ArtifactStore
from storage.tables import write_table
from tasks.compute import checkpoint, forget
from tasks.sources import read_data
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("recover")
def recover(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    config = step.config()
    model, tokenizer = checkpoint(step, "checkpoint")
    forget()
    rows = read_data(step.outside_value("data"), "recovery")[: config["examples"]]
    options = {name: config[name] for name in config if name not in ("examples", "recipe", "dtype")}
    work = ArtifactStore(step.store).work(step.stage, step.key)
    recovered, steps = saap.recover(model, rows, tokenizer, work, **options)
    saap.save(recovered, folder, tokenizer)
    write_table(folder, "training", [asdict(s) for s in steps])
    return {"steps": steps[-1].step, "first_loss": round(steps[0].loss, 4), "last_loss": round(steps[-1].loss, 4)}
