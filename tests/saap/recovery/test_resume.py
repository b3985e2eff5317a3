"""A recovery that was killed goes on, and one of minutes ends when it said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from saap import Training, load, recover
from saap.recovery.budget import TIMED
from tests.saap.recovery.conftest import RECIPE, SETTINGS, untimed


@pytest.mark.parametrize("how", [{"epochs": 1.5}, {"patience": 1, "learning_rate": 1e-30, "save_steps": 1}])
def test_a_run_killed_behind_its_last_step_takes_no_further_one_wherever_its_store_is_moved_to(
    tiny_folder, tiny_tokenizer, rows, tmp_path, how
):
    training = Training(**(SETTINGS | how))
    first, done = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path / "work", RECIPE, training)
    moved = (tmp_path / "work").rename(tmp_path / "moved")
    again, steps = recover(load(tiny_folder), rows, tiny_tokenizer, moved, RECIPE, training)
    assert steps == done
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_killed_run_says_that_it_goes_on_and_does_to_the_same_weights_and_losses(
    tiny_folder, tiny_tokenizer, rows, undisturbed, interrupted, tmp_path, caplog
):
    caplog.set_level("INFO", "saap")
    expected, expected_steps = undisturbed
    work = shutil.copytree(interrupted, tmp_path / "work")
    # as if it had been killed again while it wrote the next checkpoint
    torn = shutil.copytree(work / "checkpoint-4", work / "checkpoint-6")
    (torn / "trainer_state.json").unlink()
    (torn / "adapters.safetensors").write_bytes(b"torn")

    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, work, RECIPE, Training(**SETTINGS))
    assert "recovery goes on behind step 4" in caplog.text
    assert [untimed(s) for s in steps] == [untimed(s) for s in expected_steps]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_killed_run_goes_on_in_a_moved_store_to_the_same_weights_without_a_warning(
    tiny_folder, tiny_tokenizer, rows, undisturbed, interrupted, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    work = shutil.copytree(interrupted, tmp_path / "work")
    file = work / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    name = Path(state["best_model_checkpoint"]).name
    file.write_text(json.dumps(state | {"best_model_checkpoint": str(tmp_path / "gone" / name)}))
    model, _ = recover(load(tiny_folder), rows, tiny_tokenizer, work, RECIPE, Training(**SETTINGS))
    assert said == []
    for name, tensor in undisturbed[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_another_user_may_go_on_with_a_killed_run(interrupted, tmp_path):
    (new := tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in (interrupted / "checkpoint-4").iterdir()}
    assert "adapters.safetensors" in modes
    assert set(modes.values()) == {new.stat().st_mode}


def test_a_run_goes_on_with_less_memory_to_the_same_weights_but_for_rounding(
    tiny_folder, tiny_tokenizer, rows, undisturbed, interrupted, tmp_path
):
    expected, expected_steps = undisturbed
    work = shutil.copytree(interrupted, tmp_path / "work")
    training = Training(**(SETTINGS | {"micro_batch_size": 2, "gradient_checkpointing": True}))
    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, work, RECIPE, training)
    for field in ("step", "loss", "learning_rate"):
        found, wanted = ([getattr(step, field) for step in history] for history in (steps, expected_steps))
        assert found == pytest.approx(wanted, rel=1e-4), field
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_training_of_minutes_ends_where_it_planned_to_and_anneals_to_there(
    tiny_folder, tiny_tokenizer, rows, tmp_path, schedule
):
    training = Training(**(SETTINGS | {"minutes": 0.04, "schedule": schedule, "save_steps": 5}))
    _, steps = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, training)
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert [s.step for s in steps] == list(range(1, planned + 1))
    assert steps[-1].held_out_loss is not None
    # the first seven rates are given before it is planned
    annealed = transformers.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]),
        num_warmup_steps=2,
        num_training_steps=planned,
    ).lr_lambdas[0]
    expected = [min(done / 2, 1.0) if done <= TIMED else annealed(done) for done in range(planned)]
    assert [s.learning_rate / 2e-2 for s in steps] == pytest.approx(expected)


def test_a_training_of_minutes_that_goes_on_keeps_its_plan(
    interrupted, tiny_folder, tiny_tokenizer, rows, undisturbed, tmp_path
):
    work = shutil.copytree(interrupted, tmp_path / "work")
    (work / "plan.json").write_text("9")
    training = Training(**(SETTINGS | {"minutes": 100.0}))
    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, work, RECIPE, training)
    assert [untimed(s) for s in steps] == [untimed(s) for s in undisturbed[1]]
    for name, tensor in undisturbed[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
