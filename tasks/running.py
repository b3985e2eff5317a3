"""A stage as a Prefect task: find the artifact or publish it, under a lock, and say what happened."""

import errno
import json
import logging
import os
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger

from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.remote import Remote, remote_of
from storage.remote_files import RemoteError
from tasks.compute import take_place
from tasks.data import MissingData
from tasks.hub import HubError
from tasks.memory import give_back
from tasks.progress import shown_progress
from tasks.stage import Stage, stage_named
from tasks.step import Step
from tasks.toml import ConfigError

PACKAGES = ("saap", "torch", "transformers", "lm-eval", "prefect")

# what helps a stage that runs out of memory; those not named here take both compute.batch_size and compute.offload
REMEDIES = {
    "recover": "lower recover.micro_batch_size, or set recover.gradient_checkpointing",
    "speed": "it holds all variants at once; set speed.runs = 0 to leave it out",
    "layer_times": "it holds the dense and a narrower model at once; give prune.ratio in place of prune.target",
    "rank": "set compute.offload, or take a criterion.name that trains or cuts no whole model",
    **dict.fromkeys(("evaluate", "gradients"), "lower compute.batch_size"),
    **dict.fromkeys(("score", "fluctuation", "own_text", "recovery_text"), "set compute.offload"),
}

RETRY_SECONDS = [2.0, 10.0, 60.0]  # before each further try

_REPEATS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}


def task_of(stage: str) -> Task[[Step], dict[str, Any]]:
    """The Prefect task that makes sure the store has a step's artifact, in this process or in another one.

    It returns {stage, key, summary}: never tensors, models or bare paths.
    """
    return Task(
        run_step,
        name=stage,
        task_run_name="{step.label}",
        persist_result=False,  # the store is what remembers
        retries=len(RETRY_SECONDS),
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=is_transient,
    )


def run_step(step: Step) -> dict[str, Any]:
    """What the task does. Twice does no harm: the second time the artifact is there."""
    take_place(step)
    with shown_progress(step.label):
        reference = find_or_publish(stage_named(step.stage), step)
    get_run_logger().info("%s: %s", step.label, what_came(reference["summary"], reference.pop("fetched")))
    return reference


def what_came(summary: dict[str, Any], fetched: bool) -> str:
    """The words for a step that was made or fetched."""
    if fetched:
        return "fetched from the remote store"
    return ", ".join(f"{name} {value}" for name, value in summary.items())


def find_or_publish(stage: Stage, step: Step) -> dict[str, Any]:
    """The step's artifact, made now unless it is there; one process makes it, others wait for it.

    With a remote store it is fetched from there if it can be, and copied there if it is not.
    """
    store, remote = ArtifactStore(step.store), remote_of(step.store_remote) if step.store_remote else None
    fetched = False
    if remote is not None:
        store.prepare()  # a host that has none yet
    with store.lock(step.stage, step.key):
        manifest = store.find(step.stage, step.key)
        if manifest is None and remote is not None:
            manifest = remote.fetch(store, step.stage, step.key)
            fetched = manifest is not None
        if manifest is None:
            if remote is not None:
                _bring_inputs(remote, store, step)
            _quiet()
            about: dict[str, Any] = {
                "run_id": step.run_id,
                "params": step.config(),
                "inputs": [list(i) for i in step.inputs],
                "outside": dict(step.outside),
                "versions": {name: version(name) for name in PACKAGES},
            }
            with store.publish(step.stage, step.key, **about, summary=(summary := {})) as folder:
                summary.update(_run(stage, step, folder))
            give_back()
            store.drop_work(step.stage, step.key)
        else:
            summary = manifest["summary"]
    if remote is not None and not fetched:
        remote.upload(store, step.stage, step.key)
    return {"stage": step.stage, "key": step.key, "summary": summary, "fetched": fetched}


def _run(stage: Stage, step: Step, folder: Path) -> dict[str, Any]:
    try:
        _check_unchanged(step)
        summary = stage.run(step, folder)
        _check_unchanged(step)  # else the key would name what was read by then
        return summary
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by its name: torch may not be there yet
            raise
        remedy = REMEDIES.get(step.stage, "lower compute.batch_size, or set compute.offload")
        raise ConfigError(
            f"{step.label} needs more memory than the device has: {remedy}, and give the command again"
        ) from error


def _check_unchanged(step: Step) -> None:
    """Whether model and data are still the files that the step's key was made of; only where they were looked at."""
    found = json.loads(step.looked_at or "{}")
    if found.get("host") != socket.gethostname():
        return
    for path, about in found["files"].items():
        now = os.stat(path) if os.path.exists(path) else None
        if now is None or [now.st_size, now.st_mtime_ns] != about:
            raise ConfigError(f"{path} was changed while the run was at work: give the same command again")


def _bring_inputs(remote: Remote, store: ArtifactStore, step: Step) -> None:
    """Another host may have made them."""
    for _, stage, key in step.inputs:
        if remote.bring(store, stage, key) is None:
            raise StorageError(
                f"{stage}/{key}, which {step.label} takes, is neither in {store.root} nor in {remote.url}: "
                "give the same command again"
            )


def is_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Retry what may pass by itself (network, a disk that fails once); never what will fail the same way again."""
    try:
        state.result()
    except Exception as failure:
        # a download that failed says what to do about it, but may pass
        error = failure.__cause__ if isinstance(failure, MissingData) and failure.__cause__ else failure
        if isinstance(error, RemoteError | HubError):
            return error.may_pass
        if getattr(error, "exit_code", None) == 2:
            return False
        if isinstance(error, OSError):  # requests' connection errors are OSErrors too
            return error.errno not in _REPEATS
        return type(error).__module__.split(".")[0] in ("httpx", "httpcore", "httpx2", "httpcore2")
    return False


def _quiet() -> None:
    """Show the progress bars of our own long loops only; hide those of every file that is read or written."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "bitsandbytes", "accelerate", "transformers.trainer_utils"):  # as in saap.recovery.launch
        logging.getLogger(name).setLevel(logging.ERROR)
