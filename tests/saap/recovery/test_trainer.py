"""The trainer's parts by themselves."""

import tracemalloc

import pytest
import transformers

from saap import SaapError, Training
from saap.recovery.recover import _examples
from saap.recovery.trainer import _inputs, _Rising
from saap.texts import alpaca_example


def test_a_training_whose_loss_rises_ends_with_the_remedy():
    """By its log: a tiny random model ends at even odds, below where it began, whatever the learning rate."""
    state = transformers.TrainerState()
    logged = [3.0] + [9.0] * 8 + [2.0] * 10 + [4.6] * 20
    for loss in logged[:28]:
        state.log_history.append({"loss": loss})
        _Rising().on_log(None, state, None, {"loss": loss})
    state.log_history.append({"loss": 4.6})
    with pytest.raises(SaapError, match=r"from 3.00 to 4.60 in 29 steps: lower recover.learning_rate"):
        _Rising().on_log(None, state, None, {"loss": 4.6})
    _Rising().on_log(None, state, None, {"eval_loss": 4.6})


def test_two_hundred_thousand_rows_take_megabytes(tiny_tokenizer):
    """Ten bytes a token: a list of numbers takes 16 to 36 for each of tokens and labels."""
    row = {"instruction": "say it again", "input": "", "output": "a b c d e f g h " * 60}
    tracemalloc.start()
    learnt, held_out = _examples([row] * 300, tiny_tokenizer, Training(max_length=400))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {len(example["input_ids"]) for example in (*learnt, *held_out)} == {400}
    assert held < 10 * 400 * 300
    expected = alpaca_example(row, tiny_tokenizer, 400)
    assert _inputs(learnt[7]) == {name: expected[name] for name in ("input_ids", "labels")}
