"""Retries: what may pass by itself is tried again, what would fail the same way is not."""

import errno
import importlib
import logging
from pathlib import Path

import pytest
import torch
from prefect import flow
from transformers.trainer_utils import sort_checkpoints

import tasks.stages
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.remote_files import RemoteError
from tasks.artifact import Artifact
from tasks.data import MissingData
from tasks.hub import HubError
from tasks.running import REMEDIES, _quiet, is_transient, task_of
from tasks.stage import stage
from tasks.step import Step
from tasks.toml import ConfigError

pytestmark = pytest.mark.slow


def step(tmp_path):
    return Step("calibrate", tmp_path.name, "{}", (), (), "{}", str(tmp_path), "run")


@pytest.fixture
def failing(monkeypatch):
    """A stage that fails with each of the errors in turn, then works; and how often it was tried."""
    return lambda errors: _failing(monkeypatch, errors)


def _failing(monkeypatch, errors):
    tries = []

    @stage(version=1, publishes=Artifact, params=lambda config: {})
    def calibrate(step, folder):
        tries.append(1)
        (folder / "half.txt").write_text("half")
        if errors:
            raise errors.pop(0)
        return {"fine": True}

    monkeypatch.setattr(importlib.import_module("tasks.stages.calibrate"), "calibrate", calibrate)
    return task_of("calibrate").with_options(retry_delay_seconds=0), tries


def call(task, step):
    @flow
    def once():
        return task(step)

    return once()


def test_a_connection_that_fails_three_times_is_tried_again_and_then_works(tmp_path, prefect_server, failing):
    passing = [ConnectionError("reset"), OSError(errno.EIO, "disk hiccup"), RemoteError("no answer", may_pass=True)]
    task, tries = failing(passing)
    assert call(task, step(tmp_path)) == {"stage": "calibrate", "key": tmp_path.name, "summary": {"fine": True}}
    assert len(tries) == 4
    assert ArtifactStore(tmp_path).find("calibrate", tmp_path.name, verify=True)["summary"] == {"fine": True}


@pytest.mark.parametrize(
    "error",
    [StorageError("wrong"), RemoteError("no bucket"), ValueError("bug"), OSError(errno.EACCES, "no"), KeyError("x")],
)
def test_an_error_that_would_repeat_is_not_tried_again(tmp_path, prefect_server, failing, error):
    task, tries = failing([error])
    with pytest.raises(type(error)):
        call(task, step(tmp_path))
    assert len(tries) == 1
    assert ArtifactStore(tmp_path).find("calibrate", tmp_path.name) is None


def test_too_little_memory_on_a_gpu_is_a_line_with_the_remedy(tmp_path, prefect_server, failing):
    task, tries = failing([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")])
    with pytest.raises(ConfigError, match=r"^calibrate needs more memory .* lower compute\.batch_size") as failed:
        call(task, step(tmp_path))
    assert len(tries) == 1
    assert "\n" not in str(failed.value)


def test_the_remedy_is_one_that_helps_the_stage():
    names = {file.stem for file in Path(tasks.stages.__file__).parent.glob("[!_]*.py")}
    assert set(REMEDIES) < names
    assert "speed.runs = 0" in REMEDIES["speed"]
    assert "compute.offload" not in REMEDIES["evaluate"]


@pytest.mark.parametrize("may_pass", [True, False])
def test_a_download_that_may_pass_is_tried_again(may_pass):
    def download():
        raise MissingData("piqa is not there") from HubError("no answer", may_pass=may_pass)

    class Failed:
        result = staticmethod(download)

    assert is_transient(None, None, Failed) == may_pass


@pytest.mark.parametrize("client", ["httpx", "httpx2", "requests"])
def test_a_connection_error_of_any_client_here_passes(client):
    def ask():
        importlib.import_module(client).get("http://127.0.0.1:9", timeout=5)

    class Failed:
        result = staticmethod(ask)

    assert is_transient(None, None, Failed)


def test_a_step_does_not_say_how_it_tells_checkpoints_of_one_second_apart(tmp_path, monkeypatch):
    log, said = logging.getLogger("transformers.trainer_utils"), []
    monkeypatch.setattr(log, "handle", said.append)
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for settle in (lambda: log.setLevel(logging.WARNING), _quiet):
        settle()
        logging.Logger.warning_once.cache_clear()
        sort_checkpoints(str(tmp_path), use_mtime=True)
    assert [record.getMessage().partition(" ")[0] for record in said] == ["mtime"]
