"""What recovery and its trainer share: settings, the record of a step, where to resume."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recipe is trained.

    batch_size: examples an optimiser step; micro_batch_size: examples at once on a device.
    learning_rate: of AdamW, after a linear warm-up over warmup_steps optimiser steps, half of all at most; then by
    schedule: "linear" or "cosine" to zero, or "constant".
    max_length: tokens an example is cut at. loss_on: "response" or "text" (all of it).
    precision: of the arithmetic ("float32", "bfloat16", "float16"); adapters are float32. In float32 the float weights
    are so in training; what comes back has the dtypes that came.
    distill: share of KL(teacher ‖ model) in the loss. held_out: share of the rows, the last ones and 128 at most, that
    the held-out loss is measured on every save_steps steps and at the end; the best of these checkpoints is what comes
    back.
    patience: stop when it has not fallen so many times in a row. minutes: train for so long in place of epochs.
    """

    epochs: float = 1.0
    batch_size: int = 8
    micro_batch_size: int = 8
    learning_rate: float = 5e-4
    warmup_steps: int = 10
    schedule: str = "cosine"
    max_length: int = 256
    loss_on: str = "response"
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    distill: float = 0.0
    held_out: float = 0.04
    patience: int | None = None
    minutes: float | None = None
    save_steps: int = 50
    seed: int = 0


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step. loss: its mean over the labelled tokens of the batch; held_out_loss: if measured after it."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    tokens_per_s: float
    held_out_loss: float | None


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to the end: the trainer writes its state last."""
    folders = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for folder in reversed(folders):
        try:
            _state(folder)
            return str(folder)
        except (OSError, json.JSONDecodeError):
            continue
    return None


def settle(checkpoint: str) -> None:
    """Have the state of a checkpoint name the best one where it lies now: beside this one, wherever it was written."""
    folder = Path(checkpoint)
    state = _state(folder)
    best = state["best_model_checkpoint"]
    here = best and str(folder.with_name(Path(best).name))
    if here != best:
        draft = folder / f"{STATE}.{os.getpid()}"  # several processes may do so at once, all to the same content
        draft.write_text(json.dumps({**state, "best_model_checkpoint": here}))
        draft.replace(folder / STATE)


def ended(checkpoint: str) -> bool:
    """Whether no step comes after the checkpoint: the last one is done, or `patience` has ended the training."""
    control = _state(Path(checkpoint))["stateful_callbacks"]["TrainerControl"]
    return bool(control["args"]["should_training_stop"])


def _state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / STATE).read_text())
    return found
