import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from saap import (
    Groupwise,
    GroupwiseLinear,
    Lora,
    PooledAdapter,
    SaapError,
    Training,
    dequantize,
    load,
    recover,
    to_groupwise,
)
from saap.recovery.recover import _examples
from saap.recovery.trainer import OneDevice
from tasks.recovery import Recover
from tests.saap.recovery.conftest import RECIPE, SETTINGS, untimed


def test_the_loss_goes_down_and_what_comes_back_is_int4_without_adapters(
    tiny_folder, tiny_tokenizer, rows, undisturbed, tmp_path
):
    model, steps = undisturbed
    assert [s.step for s in steps] == list(range(1, 10))
    assert sum(s.loss for s in steps[-3:]) < 0.95 * sum(s.loss for s in steps[:3])
    assert not any(isinstance(module, PooledAdapter) for module in model.modules())
    assert sum(isinstance(module, GroupwiseLinear) for module in model.modules()) == 7 * 6
    assert not model.training
    # only the zeros have learned anything
    still = Training(**SETTINGS | {"learning_rate": 1e-12, "epochs": 1})
    untrained, _ = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, still)
    state = model.state_dict()
    for name, tensor in untrained.state_dict().items():
        assert torch.equal(state[name], tensor) != name.endswith(".zero"), name


def test_codes_are_made_on_the_text_that_is_trained_on(tiny_folder, tiny_tokenizer, rows, tmp_path):
    """The float model's outputs on it are kept better than by the nearest codes."""
    still = Training(**SETTINGS | {"learning_rate": 1e-12, "epochs": 1})
    exact, apart = load(tiny_folder), {}
    ids = tiny_tokenizer("\n".join(row["output"] for row in rows), return_tensors="pt")["input_ids"][:, :256]
    for rounding in ("feedback", "nearest"):
        recipe = Groupwise(rank=8, rounding=rounding)
        model, _ = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path / rounding, recipe, still)
        with torch.no_grad():
            apart[rounding] = float((model(ids).logits - exact(ids).logits).norm())
    assert apart["feedback"] < 0.9 * apart["nearest"]


def test_empty_answers_are_not_learned(tiny_folder, tiny_tokenizer, rows, tmp_path):
    """Alpaca has 28 of them: a model would learn to say nothing."""
    empty = [dict(rows[0], output=output) for output in ("", " \n")]
    both = [
        recover(load(tiny_folder), some, tiny_tokenizer, tmp_path / str(len(some)), RECIPE, Training(**SETTINGS))
        for some in ([*empty[:1], *rows, *empty[1:]], rows)
    ]
    assert [untimed(step) for step in both[0][1]] == [untimed(step) for step in both[1][1]]


def test_bfloat16_takes_the_same_course_and_leaves_the_attention_as_it_was(
    tiny_folder, tiny_tokenizer, rows, undisturbed, tmp_path
):
    training = Training(**(SETTINGS | {"precision": "bfloat16"}))
    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, training)
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in undisturbed[1]], rel=0.02)
    assert model.config._attn_implementation == undisturbed[0].config._attn_implementation == "sdpa"


def test_the_learning_rate_warms_up_and_then_falls_to_zero(undisturbed):
    _, steps = undisturbed
    expected = [min(done / 2, (9 - done) / 7) * 2e-2 for done in range(9)]
    assert [s.learning_rate for s in steps] == pytest.approx(expected, abs=1e-9)
    assert [s.epoch for s in steps] == pytest.approx([n / 3 for n in range(1, 10)], abs=0.01)


def test_the_logged_loss_is_the_mean_over_all_answer_tokens_of_the_batch(tiny_folder, tiny_tokenizer, rows, tmp_path):
    settings = SETTINGS | {"batch_size": 32, "epochs": 1, "micro_batch_size": 8, "held_out": 0.0}
    plain = Groupwise(rank=8, rounding="nearest")
    _, (step,) = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, plain, Training(**settings))
    small, total, count = to_groupwise(load(tiny_folder), 32), 0.0, 0
    for row in rows:
        prompt = "Below is an instruction that describes a task"
        prompt += ", paired with an input that provides further context. " if row["input"] else ". "
        prompt += "Write a response that appropriately completes the request.\n\n"
        prompt += f"### Instruction:\n{row['instruction']}\n\n"
        prompt += f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        head = tiny_tokenizer(prompt + "### Response:\n")["input_ids"]
        ids = torch.tensor([(head + tiny_tokenizer(row["output"])["input_ids"] + [2])[:256]])
        with torch.no_grad():
            logp = small(ids).logits[0].log_softmax(-1)
        for t in range(len(head), ids.shape[1]):
            total -= logp[t - 1, ids[0, t]].item()
            count += 1
    assert step.loss == pytest.approx(total / count, rel=1e-4)


def test_the_best_checkpoint_comes_back_and_training_stops_when_it_gets_no_better(
    tiny_folder, tiny_tokenizer, rows, tmp_path
):
    training = Training(**(SETTINGS | {"learning_rate": 0.3, "schedule": "constant", "warmup_steps": 0, "epochs": 20,
                                       "save_steps": 1, "patience": 2}))  # fmt: skip
    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, training)
    losses = [s.held_out_loss for s in steps]
    best = min(losses)
    assert len(steps) == losses.index(best) + 3 < 60
    measured = Training(**(SETTINGS | {"learning_rate": 1e-30, "epochs": 0.3}))
    again = dequantize(model)
    _, (step, *_) = recover(again, rows, tiny_tokenizer, tmp_path / "again", Lora(rank=1), measured)
    assert step.held_out_loss == pytest.approx(best, rel=2e-3)  # the zeros are float16 now


def test_a_pickle_in_the_work_folder_is_refused_and_not_run(tiny_folder, tiny_tokenizer, rows, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    settings = SETTINGS | {"epochs": 1, "save_steps": 1}
    recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path / "work", RECIPE, Training(**settings))
    shutil.rmtree(tmp_path / "work" / "checkpoint-3")
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save(Touch(), tmp_path / "work" / "checkpoint-2" / name)
    with pytest.raises(SaapError, match="checkpoint-2"):
        recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path / "work", RECIPE, Training(**settings))
    assert not (tmp_path / "run").exists()


def test_no_more_rows_are_held_out_than_it_takes(tiny_llama, tiny_tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["saap.recovery.recover"], "HELD_OUT_AT_MOST", 4)
    settings = SETTINGS | {"batch_size": 4, "epochs": 1, "save_steps": 50}  # a share of 0.25 is 8 rows of the 32
    _, steps = recover(tiny_llama(), rows, tiny_tokenizer, tmp_path, RECIPE, Training(**settings))
    assert len(steps) == (32 - 4) / 4


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 10},
        {"batch_size": 2},
        {"batch_size": 0},
        {"batch_size": 32, "micro_batch_size": 32},
        {"max_length": 4},
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused(tiny_llama, tiny_tokenizer, rows, tmp_path, settings):
    with pytest.raises(SaapError):
        recover(tiny_llama(), rows, tiny_tokenizer, tmp_path, RECIPE, Training(**(SETTINGS | settings)))


def test_other_text_does_not_hide_that_every_answer_is_cut_off(tiny_llama, tiny_tokenizer, rows, tmp_path):
    mixed = [*rows, *({"tokens": [5] * 4} for _ in range(40))]
    with pytest.raises(SaapError, match=r"answer of none of 32 instruction rows begins within max_length 4"):
        recover(tiny_llama(), mixed, tiny_tokenizer, tmp_path, RECIPE, Training(**(SETTINGS | {"max_length": 4})))


def test_a_damaged_model_is_an_error_before_the_first_step(tiny_llama, tiny_tokenizer, rows, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(SaapError, match=r"before the first step is not finite: neither is .*lm_head\.weight"):
        recover(model, rows, tiny_tokenizer, tmp_path, RECIPE, Training(**(SETTINGS | {"epochs": 1})))


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_loss_that_is_no_longer_finite_ends_the_training_and_no_checkpoint_has_it(
    tiny_folder, tiny_tokenizer, rows, tmp_path, held_out
):
    ruinous = {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1, "held_out": held_out}
    with pytest.raises(SaapError, match=r"not finite at step \d+: lower|risen from \d\.\d\d to nan by step \d+: lower"):
        recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, Training(**(SETTINGS | ruinous)))
    for file in tmp_path.glob("checkpoint-*/trainer_state.json"):
        assert "NaN" not in file.read_text()


def test_a_training_that_has_not_helped_says_so(tiny_folder, tiny_tokenizer, rows, tmp_path, caplog):
    still = Training(**(SETTINGS | {"learning_rate": 1e-30, "epochs": 1}))
    recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPE, still)
    assert "recovery has not helped: the held-out loss was 6." in caplog.text


@pytest.mark.parametrize(("loss_on", "kept"), [("response", 32), ("text", 33)])
def test_rows_that_are_left_out_are_counted_and_so_is_what_cannot_be_held_out(
    tiny_tokenizer, rows, caplog, loss_on, kept
):
    """One answer is empty. One prompt fills max_length: it has nothing to learn from unless the loss is on it too."""
    long = dict(rows[0], instruction="word " * 300)
    training = Training(held_out=0.01, max_length=256, loss_on=loss_on, micro_batch_size=4)
    learnt, held_out = _examples([*rows, long, dict(rows[1], output=" ")], tiny_tokenizer, training)
    assert (len(learnt), len(held_out)) == (kept, 0)
    assert f"{34 - kept} of 34 instruction rows are left out" in caplog.text
    assert f"no example is held out (recover.held_out = 0.01 of {kept})" in caplog.text


def test_training_takes_one_device_however_many_are_visible(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4}
    assert TrainingArguments(**options).train_batch_size == 8  # what the trainer makes of it
    pinned = OneDevice(**options, own_device="cpu:0")
    assert (pinned.n_gpu, pinned.train_batch_size, pinned.device) == (1, 4, torch.device("cpu:0"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_is_trained_there(tiny_folder, tiny_tokenizer, rows, undisturbed, tmp_path):
    model = load(tiny_folder, device="cuda:1")
    model, steps = recover(model, rows, tiny_tokenizer, tmp_path, RECIPE, Training(**SETTINGS))
    assert {tensor.device for tensor in model.state_dict().values()} == {torch.device("cuda:1")}
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in undisturbed[1]], rel=1e-3)


def test_a_run_is_told_what_the_library_does_by_itself():
    for made in (Training(), Groupwise()):
        for field in fields(made):
            assert getattr(made, field.name) == getattr(Recover(), field.name), field.name
