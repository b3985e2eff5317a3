"""Prose to recover on, drawn from the calibration set and written by the dense model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from storage.keys import digest
from tasks.artifact import Source
from tasks.config import RunConfig
from tasks.data import calibration_texts, read_data
from tasks.inputs import Checkpoint, Data, Tokenizer, load_model, load_tokenizer
from tasks.outside import Outside
from tasks.recovery import counts
from tasks.stage import Summary, dtype_of, stage
from tasks.stages.calibrate import Calibration, write_calibration
from tasks.step import Step
from tasks.toml import ConfigError

OTHER_SEED = 1_000_003  # added: not the sequences that the same seed calibrates with


def _params(config: RunConfig) -> dict[str, object]:
    recover = config.recover
    # shares are of as many as there are instruction rows
    wanted = recover.shares if recover.examples is None else counts(recover.shares, recover.examples)
    return wanted | {"length": recover.max_length, "seed": recover.seed} | (dtype_of(config) if recover.own else {})


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    weights = outside.model.weights if "model" in inputs else None
    found = [weights, outside.model.tokenizer, outside.data("prose") if "data" in inputs else None]
    return digest([*found, outside.data("recovery")] if "instructions" in inputs else found)


@stage(version=1, publishes=Calibration, params=_params, fingerprint=_fingerprint)
def recovery_text(
    step: Step,
    folder: Path,
    *,
    tokenizer: Tokenizer,
    model: Checkpoint | None = None,
    data: Data | None = None,
    instructions: Data | None = None,
) -> Summary:
    """instructions: what the shares are of where no number of examples is given; then prose may run out."""
    import saap

    config, words = step.config(), load_tokenizer(step)
    count = {name: config[name] for name in ("prose", "own")}
    if instructions is not None:
        there = len(read_data(instructions.name, "recovery"))
        count = counts(count, there)
        if not any(count.values()):
            raise ConfigError(
                f"recover.prose and recover.own of {there} instruction rows are less than one: raise them"
            )
    about = {"length": config["length"], "seed": config["seed"] + OTHER_SEED}
    tokens, rows = [], []
    if data is not None and count["prose"]:
        texts, wanted = calibration_texts(data.name), {"count": count["prose"], "at_most": instructions is not None}
        try:
            drawn, begun = saap.sample_tokens(texts, words, **wanted, **about)
        except saap.SaapError as error:
            raise ConfigError(f"prose to recover on, from {data.name}: {error}") from error
        if len(drawn) < count["prose"]:
            count |= {"prose_wanted": count["prose"], "prose": len(drawn)}
        tokens, rows = [drawn.numpy()], [begun]
    if model is not None and count["own"]:
        written = saap.own_text(load_model(step, model, use="slices"), words, count=count["own"], **about)
        tokens, rows = [*tokens, written.numpy()], [*rows, np.full(len(written), -1)]
    write_calibration(folder, np.concatenate(tokens), np.concatenate(rows))
    return {name: number for name, number in count.items() if number}
