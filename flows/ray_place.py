"""Steps on a Ray cluster, by Prefect's runner for it.

Every node sees the store at the same path, or has one of its own there, which is a cache of the remote store.
"""

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import ray
from prefect import get_run_logger
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings
from prefect.states import State
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from flows.places import ALONE, Ended, WorkerDied, beside, crashed, model_of, task_named
from flows.server import LOOPBACK
from storage.errors import StorageError
from tasks.compute import placed
from tasks.step import Step


class Ray:
    """As many steps at once as the cluster has GPUs or cores for: each asks for what it needs, and Ray queues.

    A step whose node dies is run again by Ray on another one.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._runner: RayTaskRunner[Any] | None = None
        self._said: dict[str, int] = {}
        self._at_work: dict[Any, tuple[Step, PrefectFuture[Any]]] = {}  # by Ray's reference

    def choose(self, ready: Sequence[Step]) -> Step | None:
        return next(iter(beside(ready, [step for step, _ in self._at_work.values()])), None)

    def start(self, step: Step, after: list[State]) -> None:
        if self._runner is None:
            self._runner = self._started()
        cores, gpus = _smallest("CPU"), _smallest("GPU")
        compute = json.loads(step.compute)
        threads = compute["threads"] or max(1, cores)
        on_gpu = compute["device"] != "cpu" and (model_of(step) is not None or step.stage in ALONE)
        asked = {"num_cpus": threads} | ({"num_gpus": 1} if on_gpu and (gpus or compute["device"] != "auto") else {})
        if asked != self._said and not any(fits(asked, node) for node in ray.nodes()):
            self._said = asked
            wanted = " and ".join(f"{count} {what.removeprefix('num_')}" for what, count in asked.items())
            get_run_logger().warning("%s waits for a node with %s: the cluster has none now", step.label, wanted)
        with remote_options(**asked):
            future = self._runner.submit(task_named(step.stage), {"step": placed(step, None, threads)}, wait_for=after)
        self._at_work[future.wrapped_future] = step, future

    def wait(self) -> Ended:
        (reference,), _ = ray.wait(list(self._at_work), num_returns=1)
        step, future = self._at_work.pop(reference)
        try:
            state: State = ray.get(reference)
            return step, state, state
        except ray.exceptions.RayError as error:
            line = str(error).strip().splitlines()[0]
            crashed(future, line)
            return step, None, WorkerDied(f"Ray lost {step.label} ({line}): the same command goes on from here")

    def _started(self) -> RayTaskRunner[Any]:
        quiet = {"log_to_driver": False, "logging_level": "WARNING"}
        own = {} if self._address else {"include_dashboard": False}
        runner: RayTaskRunner[Any] = RayTaskRunner(self._address, init_kwargs=quiet | own)
        try:
            if self._address:
                _knock(self._address)
            runner.__enter__()
        except (OSError, RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise StorageError(
                f"no Ray cluster at execute.address = '{self._address}' ({line}): ray start --head starts one"
            ) from error
        url = str(get_current_settings().api.url)
        if far := out_of_reach(url, socket.gethostname(), ray.nodes()):
            runner.__exit__(None, None, None)
            raise StorageError(
                f"{', '.join(far)} cannot reach the Prefect server at {url}, which steps there report to: start one "
                "with prefect server start --host 0.0.0.0, and set PREFECT_API_URL to it"
            )
        return runner

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._runner is not None:
            for reference in self._at_work:  # what is at work is of no use any more
                ray.cancel(reference, force=True)
            self._runner.__exit__(*raised)


def fits(asked: Mapping[str, int], node: Mapping[str, Any]) -> bool:
    """Whether a node would have what a step asks for, with nothing else at work there."""
    there = {"num_cpus": node["Resources"].get("CPU", 0), "num_gpus": node["Resources"].get("GPU", 0)}
    return bool(node["Alive"]) and all(there[what] >= count for what, count in asked.items())


def out_of_reach(server: str, here: str, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The hosts of the cluster that cannot reach a server: all others, if it listens on this one's loopback only."""
    hosts = {node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    return sorted(hosts - {here}) if urlsplit(server).hostname in LOOPBACK else []


def _knock(address: str) -> None:
    """Raises OSError or ValueError when nobody is there. Ray itself asks for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10):
        pass


def _smallest(resource: str) -> int:
    """How many of it the node with the fewest has, of the nodes that have some; 0 when none has."""
    counts = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in counts if count), default=0)
