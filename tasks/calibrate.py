"""Draw the calibration sequences."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.tables import write_table
from tasks.data import read_data
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("calibrate")
def calibrate(step: Step, folder: Path) -> dict[str, Any]:
    from saap import load_tokenizer, sample_tokens

    config = step.config()
    texts = [row["text"] for row in read_data(step.outside_value("data"), "calibration")]
    tokenizer = load_tokenizer(step.folder("tokenizer"))
    tokens, rows = sample_tokens(texts, tokenizer, **config)
    count, length = tokens.shape
    write_table(
        folder,
        "calibration",
        {
            "sample": np.repeat(np.arange(count), length),
            "position": np.tile(np.arange(length), count),
            "token": tokens.flatten().numpy(),
            "source_row": np.repeat(rows, length),
        },
    )
    return {"samples": count, "tokens": count * length}
