"""Means, variances and norms of what heads and channels write."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.tables import write_table
from tasks.compute import calibration_tokens, checkpoint, settings
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("activations")
def activations(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    model, _ = checkpoint(step, "model", use="blocks")
    tokens = calibration_tokens(step)
    found = saap.input_moments(model, tokens, batch_size=settings(step)["batch_size"])
    size = [len(moments.mean) for moments in found.values()]
    write_table(
        folder,
        "moments",
        {
            "layer": np.repeat([layer for layer, _ in found], size),
            "kind": np.repeat([kind for _, kind in found], size),
            "channel": np.concatenate([np.arange(count) for count in size]),
            **{
                name: np.concatenate([getattr(moments, name) for moments in found.values()])
                for name in ("mean", "variance", "norm")
            },
        },
    )
    return {"samples": len(tokens)}
