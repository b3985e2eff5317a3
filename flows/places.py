"""Where steps run: one by one in this process, or side by side in processes with a GPU or a share of the cores each.

Every place takes steps and hands them to Prefect as task runs; flows/graph.py says when.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from prefect import Task
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture
from prefect.states import Crashed, State
from prefect.task_runners import ProcessPoolTaskRunner

from storage.errors import StorageError
from tasks.compute import placed
from tasks.how import Execute
from tasks.running import task_of
from tasks.step import Step

ALONE = ("speed",)  # stages that measure the machine: nothing else of the sweep runs beside them
Ended = tuple[Step, Any, State | BaseException]  # with its ticket: what later steps name as what they waited for


class Place(Protocol):
    """Takes the steps of a graph. A context manager: what it started ends with the block."""

    def choose(self, ready: Sequence[Step]) -> Step | None:
        """Which of the steps to start now; None when there is no room. With nothing at work there is room."""

    def start(self, step: Step, after: list[Any]) -> None:
        """after: the tickets of the steps that made its inputs."""

    def wait(self) -> Ended:
        """A step that has ended, as soon as there is one."""

    def __enter__(self) -> "Place": ...

    def __exit__(self, *raised: Any) -> None: ...


def place_for(execute: Execute) -> Place:
    """The place that a configuration asks for."""
    if execute.runner == "ray":
        from flows.ray_place import Ray

        return Ray(execute.address)
    return Serial() if execute.runner == "serial" else Slots(execute.slots)


class Serial:
    """One step after the other, in this process."""

    def __init__(self) -> None:
        self._ended: list[Ended] = []

    def choose(self, ready: Sequence[Step]) -> Step | None:
        return ready[0] if ready and not self._ended else None

    def start(self, step: Step, after: list[Any]) -> None:
        state: State = task_named(step.stage)(step, wait_for=after, return_state=True)
        self._ended.append((step, state, state))

    def wait(self) -> Ended:
        return self._ended.pop()

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


class Slots:
    """Several steps at once, each in a process of its own that stays: Prefect's process pool, one for each slot.

    A slot has one of the GPUs, or its share of the cores, and is given steps of the model that it has loaded last.
    """

    def __init__(self, count: int) -> None:
        self._slots = [Slot(number, count) for number in range(count)]
        self._ended: queue.SimpleQueue[tuple[Slot, PrefectFuture[Any]]] = queue.SimpleQueue()

    def choose(self, ready: Sequence[Step]) -> Step | None:
        free = self._free()
        may = beside(ready, [slot.step for slot in self._slots if slot.step is not None])
        if not free or not may:
            return None
        # first a step whose model a free slot has, then one whose model no slot has
        theirs, known = {slot.model for slot in free}, {slot.model for slot in self._slots}
        return min(may, key=lambda step: 0 if model_of(step) in theirs else 1 if model_of(step) not in known else 2)

    def start(self, step: Step, after: list[Any]) -> None:
        slot = self._slot_for(step)
        slot.start(step, after).add_done_callback(lambda future: self._ended.put((slot, future)))

    def wait(self) -> Ended:
        slot, future = self._ended.get()
        return slot.end(future)

    def _slot_for(self, step: Step) -> "Slot":
        return min(self._free(), key=lambda slot: slot.model != model_of(step))

    def _free(self) -> list["Slot"]:
        return [slot for slot in self._slots if slot.step is None]

    def __enter__(self) -> "Slots":
        return self

    def __exit__(self, kind: Any, *raised: Any) -> None:
        if kind is not None:  # what is at work is of no use any more
            for process in multiprocessing.active_children():
                process.kill()
        for slot in self._slots:
            slot.close()


class Slot:
    """A worker process, started with its first step."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self._count = number, count
        self.step: Step | None = None
        self.model: str | None = None
        self._runner: ProcessPoolTaskRunner | None = None

    def start(self, step: Step, after: list[Any]) -> PrefectFuture[Any]:
        if self._runner is None:
            self._runner = ProcessPoolTaskRunner(max_workers=1, initializer=worker_starts, initargs=(os.getpid(),))
            self._runner.__enter__()
        self.step, self.model = step, model_of(step) or self.model
        share = None if step.stage in ALONE else max(1, len(os.sched_getaffinity(0)) // self._count)
        there = placed(step, gpu_of(self.number), share)
        return self._runner.submit(task_named(step.stage), {"step": there}, wait_for=after)

    def end(self, future: PrefectFuture[Any]) -> Ended:
        assert self.step is not None
        step, self.step = self.step, None
        try:
            future.wait()
            return step, future, future.state
        except Exception as error:  # the pool is broken, or could not send the step
            self.close()
            crashed(future, f"its worker process died: {type(error).__name__}")
            return (
                step,
                future,
                WorkerDied(
                    f"the worker process of slot {self.number} died in {step.label} (killed, or out of memory): "
                    "the same command goes on from here"
                ),
            )

    def close(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
        self._runner = self.model = None


class WorkerDied(StorageError):
    """The process that a step ran in is gone."""


def beside(ready: Sequence[Step], at_work: Sequence[Step]) -> list[Step]:
    """Those that may start beside what is at work. A step that measures the machine waits until it is alone."""
    if any(step.stage in ALONE for step in at_work):
        return []
    others = [step for step in ready if step.stage not in ALONE]
    return others or ([] if at_work else list(ready[:1]))


def model_of(step: Step) -> str | None:
    """The folder of the model that a step loads."""
    return next((str(step.place(name)) for name in ("model", "checkpoint") if step.has(name)), None)


def gpu_of(slot: int) -> str:
    """What CUDA_VISIBLE_DEVICES is in a slot: one of those that this process sees, or none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(slot)] * (slot + 1) if visible is None else visible.split(",")
    return names[slot].strip() if slot < len(names) else ""


@cache
def task_named(stage: str) -> Task[[Step], dict[str, Any]]:
    return task_of(stage)


def worker_starts(parent: int) -> None:
    """In a worker process, before its first step: it dies with this process, and leaves the screen to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died while this process started
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)  # the last one to be called: DuckDB would complain of what is left
    os.environ["TQDM_DISABLE"] = "1"
    from flows.progress import show_progress
    from flows.tracebacks import hide_user_tracebacks

    show_progress("quiet")
    hide_user_tracebacks()


def crashed(future: PrefectFuture[Any], why: str) -> None:
    """Say on the server that a task run will not end by itself."""
    with contextlib.suppress(PrefectException), get_client(sync_client=True) as client:
        client.set_task_run_state(future.task_run_id, Crashed(message=why), force=True)
