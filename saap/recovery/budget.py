"""Training for a time: how many steps it has is planned by its first ones."""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from saap.recovery.training import Training

TIMED = 6  # steps; the first one, which is slower, is not counted
UNPLANNED = 10**9  # steps


class Budget(TrainerCallback):
    """Plans a training of so many minutes, the held-out losses between its steps included, and its learning rate.

    The plan is kept in the work folder: a training that goes on ends at the same step, whatever the machine does then.
    """

    def __init__(self, training: Training, work: Path, held_out: int) -> None:
        """held_out: rows that the held-out loss is measured on."""
        self._training, self._held_out, self._file = training, held_out, work / "steps.json"
        self.steps: int | None = json.loads(self._file.read_text()) if self._file.is_file() else None
        self._ends: list[float] = []

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: a linear warm-up, then the schedule, to 0 at the planned end."""
        warmup, schedule = self._training.warmup_steps, self._training.schedule
        if step < warmup:
            return step / warmup
        if self.steps is None or schedule == "constant":
            return 1.0
        if schedule == "linear":
            return max(0.0, (self.steps - step) / max(1, self.steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.steps - warmup))))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends = [time.perf_counter()]
        state.max_steps = self.steps or UNPLANNED

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(time.perf_counter())
        if self.steps is None and len(self._ends) > TIMED:
            planned = [state.global_step + self._more()]
            broadcast_object_list(planned)
            self.steps = state.max_steps = planned[0]
            if state.is_world_process_zero:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.write_text(json.dumps(self.steps))

    def _more(self) -> int:
        """Steps that fit into what is left of the time."""
        assert self._training.minutes is not None
        left = 60 * self._training.minutes - (self._ends[-1] - self._ends[0])
        step = statistics.median(b - a for a, b in zip(self._ends[1:], self._ends[2:], strict=False))
        # a held-out loss is the forward passes, about a third of the work, of its rows, every save_steps steps
        measured = step * self._held_out / self._training.batch_size / 3
        return max(1, int((left - measured) / (step + measured / self._training.save_steps)))
