"""Text that the dense model writes itself, behind the calibration text."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from storage.keys import digest
from storage.tables import read_table
from tasks.artifact import Source
from tasks.config import RunConfig
from tasks.inputs import Checkpoint, calibration_bos, load_model, load_tokenizer
from tasks.outside import Outside
from tasks.stage import Summary, dtype_of, stage
from tasks.stages.calibrate import Calibration, write_calibration
from tasks.step import Step


def _params(config: RunConfig) -> dict[str, object]:
    return {"count": config.settled().calibrate.own, "seed": config.calibrate.seed} | dtype_of(config)


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    return digest([outside.model.weights, outside.model.tokenizer])


@stage(version=1, publishes=Calibration, params=_params, fingerprint=_fingerprint)
def own_text(step: Step, folder: Path, *, model: Checkpoint, calibration: Calibration) -> Summary:
    import saap

    config, tokenizer = step.config(), load_tokenizer(step)
    config.pop("dtype")
    table = read_table(calibration.place, "calibration")
    drawn, begun = (table[name].reshape(int(table["sample"][-1]) + 1, -1) for name in ("token", "source_row"))
    dense = load_model(step, model, use="slices")
    own = saap.own_text(dense, tokenizer, length=drawn.shape[1], bos=calibration_bos(step), **config)
    rows = np.concatenate([begun[:, 0], np.full(len(own), -1)])
    write_calibration(folder, np.concatenate([drawn, own.numpy()]), rows)
    return {"drawn": len(drawn), "written": len(own)}
