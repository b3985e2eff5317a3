"""Recovery from folder to folder, in one process and in two that accelerate's launcher starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saap import SaapError, load
from saap.recovery.launch import Job, run, run_launched

# the launcher's precision has no say
TWO = "--num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no --main_process_port 0"


@pytest.fixture
def job(tiny_folder, mini, tmp_path):
    rows = sorted(mini("alpaca/train"), key=lambda row: len("".join(row.values())))[:16]
    training = {"epochs": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0,
                "precision": "float32", "held_out": 0.25, "save_steps": 1, "distill": 0.5}  # fmt: skip
    (tmp_path / "out").mkdir()
    return Job(checkpoint=str(tiny_folder), tokenizer=str(tiny_folder), teacher=str(tiny_folder), rows=rows,
               work=str(tmp_path / "work"), output=str(tmp_path / "out"), recipe="groupwise", options={"rank": 4},
               training=training)  # fmt: skip


@pytest.mark.parametrize("way", ["--multi_gpu", "--use_fsdp"])
def test_two_processes_take_the_same_steps_as_one(job, tmp_path, way):
    (tmp_path / "two").mkdir()
    training = job.training | {"gradient_checkpointing": way == "--use_fsdp"}  # which comes back to a layer it left
    other = replace(job, work=str(tmp_path / "w2"), output=str(tmp_path / "two"), training=training)
    together = run_launched(other, f"{way} {TWO}")
    alone = run(job)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        for name in ("step", "epoch", "loss", "learning_rate", "held_out_loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    first, second = load(job.output).state_dict(), load(tmp_path / "two").state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name].float(), tensor.float(), rtol=1e-2, atol=2e-3)


def test_two_processes_share_a_plan(job):
    planned = replace(job, training=job.training | {"minutes": 0.05, "save_steps": 5})
    steps = run_launched(planned, f"--multi_gpu {TWO}")
    end = json.loads(Path(job.work, "plan.json").read_text())
    assert end > 6
    assert [step["step"] for step in steps] == list(range(1, end + 1))


def test_a_launch_that_fails_is_an_error(job, capfd):
    with pytest.raises(SaapError, match="--no-such-option"):
        run_launched(job, "--no-such-option")
    assert "no-such-option" in capfd.readouterr().err
