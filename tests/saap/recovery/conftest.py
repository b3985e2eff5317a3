"""A recovery of the tiny model, and the same one killed on its way."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from saap import Groupwise, Training, load, recover

RECIPE = Groupwise(rank=8, alpha=16.0, rounding="feedback")
SETTINGS = {"epochs": 3, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 2,
            "schedule": "linear", "precision": "float32", "held_out": 0.25, "save_steps": 2, "seed": 3}  # fmt: skip

KILLED = """
import json, os, signal, sys
import torch
from transformers import TrainerCallback, trainer
from saap import Groupwise, Training, load, load_tokenizer, recover

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
trainer.DEFAULT_CALLBACKS.append(Kill)
folder, work, rows, settings = sys.argv[1:]
recipe, training = Groupwise(rank=8, alpha=16.0, rounding="feedback"), Training(**json.loads(settings))
recover(load(folder), json.loads(rows), load_tokenizer(folder), work, recipe, training)
"""


def untimed(step):
    return replace(step, tokens_per_s=0.0)


@pytest.fixture(scope="session")
def interrupted(killed):
    """The work folder of the killed run."""
    process, work = killed
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert {folder.name for folder in work.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    return work


@pytest.fixture(scope="session")
def rows(mini):
    """The 32 shortest: 24 to train on, 3 steps an epoch, and 8 held out."""
    return sorted(mini("alpaca/train"), key=lambda row: len("".join(row.values())))[:32]


@pytest.fixture(scope="session")
def killed(tiny_folder, rows, tmp_path_factory):
    """The process of a run that kills itself at step 5, and its work folder; the other tests run meanwhile."""
    work = tmp_path_factory.mktemp("killed")
    script = [sys.executable, "-c", KILLED, str(tiny_folder), str(work), json.dumps(rows), json.dumps(SETTINGS)]
    with subprocess.Popen(script, stderr=subprocess.PIPE, text=True) as process:
        yield process, work


@pytest.fixture(scope="session")
def undisturbed(killed, tiny_folder, tiny_tokenizer, rows, tmp_path_factory):
    return recover(
        load(tiny_folder), rows, tiny_tokenizer, tmp_path_factory.mktemp("work"), RECIPE, Training(**SETTINGS)
    )
