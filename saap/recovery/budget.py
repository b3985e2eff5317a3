"""Training for a time: how many steps it has is planned by its first ones."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from saap.recovery.training import Training

TIMED = 6  # steps; the first one, which is slower, is not counted
UNPLANNED = 10**9  # steps


class Budget(TrainerCallback):
    """Plans a training of so many minutes, the held-out losses between its steps included, and its learning rate.

    Steps differ in length, the first of an epoch are the longest; so what is timed is a token, padding included. The
    plan is kept in the work folder: a training that goes on ends at the same step, whatever the machine does then.
    """

    def __init__(self, training: Training, work: Path, tokens: Callable[[], Iterator[int]], held_out: int) -> None:
        """tokens: gives those of each step, of all processes. held_out: those of a held-out loss, on each process."""
        self._training, self._tokens, self._held_out = training, tokens, held_out
        self._file = work / "plan.json"
        try:
            self.steps: int | None = int(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or a damaged one
            self.steps = None
        self._ends: list[float] = []

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: a linear warm-up, half of them at most; then the schedule, to 0."""
        warmup, schedule = self._training.warmup_steps, self._training.schedule
        if self.steps is not None:
            warmup = min(warmup, self.steps // 2)
        if step < warmup:
            return step / warmup
        if self.steps is None or schedule == "constant":
            return 1.0
        if schedule == "linear":
            return max(0.0, (self.steps - step) / max(1, self.steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.steps - warmup))))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends = [time.perf_counter()]
        self._set(state, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(time.perf_counter())
        if self.steps is None and len(self._ends) > TIMED:
            self._set(state, self.planned(self._ends[-TIMED - 1 :], state.global_step, args.world_size))
            if state.is_world_process_zero:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                partial = self._file.with_suffix(".tmp")
                partial.write_text(json.dumps(self.steps))
                os.replace(partial, self._file)

    def _set(self, state: Any, steps: int | None) -> None:
        """The same plan on every process: that of the first."""
        found = [steps]
        broadcast_object_list(found)
        self.steps = found[0]
        state.max_steps = self.steps or UNPLANNED

    def planned(self, ends: list[float], done: int, processes: int) -> int:
        """The last step that ends within the time. ends: when the training began and when each timed step ended."""
        assert self._training.minutes is not None
        tokens = self._tokens()
        timed = list(itertools.islice(tokens, done))[1 - TIMED :]
        second = (ends[-1] - ends[1]) / sum(timed)  # seconds a token
        # a held-out loss is a forward pass, a third of the work, and each process makes it of all rows
        measured = second * processes * self._held_out / 3
        left = 60 * self._training.minutes - (ends[-1] - ends[0]) - measured
        steps = done + 1
        for count in tokens:
            left -= second * count + (measured if steps % self._training.save_steps == 0 else 0)
            if left < 0:
                break
            steps += 1
        return max(done + 1, steps - 1)
