"""Prose to recover on, drawn from the calibration set and written by the dense model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from storage.keys import digest
from tasks.artifact import Source
from tasks.config import RunConfig
from tasks.data import calibration_texts
from tasks.inputs import Checkpoint, Data, Tokenizer, load_model, load_tokenizer
from tasks.outside import Outside
from tasks.recovery import Recover
from tasks.stage import Summary, dtype_of, stage
from tasks.stages.calibrate import Calibration, write_calibration
from tasks.step import Step

OTHER_SEED = 1_000_003  # added: not the sequences that the same seed calibrates with


def shares(recover: Recover) -> dict[str, int]:
    """How many of the examples are prose, and how many the model's own: none where they are not counted."""
    examples = recover.examples or 0
    prose = round(recover.prose * examples)
    return {"prose": prose, "own": round((recover.prose + recover.own) * examples) - prose}


def _params(config: RunConfig) -> dict[str, object]:
    counts, recover = shares(config.recover), config.recover
    return counts | {"length": recover.max_length, "seed": recover.seed} | (dtype_of(config) if counts["own"] else {})


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    weights = outside.model.weights if "model" in inputs else None
    return digest([weights, outside.model.tokenizer, outside.data("calibration") if "data" in inputs else None])


@stage(version=1, publishes=Calibration, params=_params, fingerprint=_fingerprint)
def recovery_text(
    step: Step, folder: Path, *, tokenizer: Tokenizer, model: Checkpoint | None = None, data: Data | None = None
) -> Summary:
    import saap

    config, words = step.config(), load_tokenizer(step)
    about = {"length": config["length"], "seed": config["seed"] + OTHER_SEED}
    tokens, rows = [], []
    if data is not None:
        drawn, begun = saap.sample_tokens(calibration_texts(data.name), words, count=config["prose"], **about)
        tokens, rows = [drawn.numpy()], [begun]
    if model is not None:
        written = saap.own_text(load_model(step, model, use="slices"), words, count=config["own"], **about)
        tokens, rows = [*tokens, written.numpy()], [*rows, np.full(len(written), -1)]
    write_calibration(folder, np.concatenate(tokens), np.concatenate(rows))
    return {name: config[name] for name in ("prose", "own") if config[name]}
