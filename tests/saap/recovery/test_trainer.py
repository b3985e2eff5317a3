"""The trainer's parts by themselves."""

import itertools
import tracemalloc

import pytest
import torch

from saap import Groupwise, SaapError, Training, load, recover
from saap.recovery.budget import Budget
from saap.recovery.order import Order, inputs
from saap.recovery.recover import _examples
from saap.texts import alpaca_example


def test_a_training_that_makes_the_held_out_loss_worse_ends_with_the_remedy(
    tiny_folder, tiny_tokenizer, mini, tmp_path
):
    """The model knows its rows by heart first: a random one has nothing to lose."""
    model, rows = load(tiny_folder), sorted(mini("alpaca/train"), key=lambda row: len("".join(row.values())))[:32]
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(8):
        for row in rows:
            example = alpaca_example(row, tiny_tokenizer, 400)
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            model(input_ids=ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    training = Training(
        epochs=3,
        micro_batch_size=4,
        learning_rate=1e3,
        warmup_steps=2,
        precision="float32",
        held_out=0.25,
        save_steps=2,
    )
    with pytest.raises(SaapError, match=r"has risen from \d.\d\d to \d+.\d\d by step 2: lower recover.learning_rate"):
        recover(model, rows, tiny_tokenizer, tmp_path, Groupwise(rank=8), training)


def test_a_warm_up_takes_half_of_a_short_training_at_most_of_steps_or_of_minutes(
    tiny_folder, tiny_tokenizer, mini, tmp_path
):
    rows = sorted(mini("alpaca/train"), key=lambda row: len("".join(row.values())))[:32]
    training = Training(warmup_steps=10, schedule="linear", precision="float32", held_out=0.0)
    _, steps = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, Groupwise(rank=8), training)
    budget = Budget(training, tmp_path, lambda: iter(()), 0)
    budget.steps = len(steps)
    expected = [0.0, 0.5, 1.0, 0.5]
    assert [step.learning_rate / training.learning_rate for step in steps] == pytest.approx(expected)
    assert [budget.rate(step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(("held_out", "processes", "expected"), [(0, 1, 62), (384, 1, 50), (384, 2, 46)])
def test_a_plan_counts_tokens_and_held_out_losses(tmp_path, held_out, processes, expected):
    """A second for 128 tokens: of the minute ten are gone. A held-out loss every ten steps and one at the end."""
    steps = itertools.chain([128] * 50, itertools.repeat(64))
    budget = Budget(Training(minutes=1.0, save_steps=10), tmp_path, lambda: steps, held_out)
    assert budget.planned([0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 6, processes) == expected


def test_the_tokens_of_a_step_are_those_of_its_padded_micro_batches():
    order = Order([3, 9, 4, 8, 5, 7, 6, 2, 1, 10], batch_size=4, seed=1)
    tokens = list(itertools.islice(order.tokens(2), 6))
    expected = []
    for epoch in range(2):
        order.set_epoch(epoch)
        lengths = [order.lengths[i] for i in order]
        expected += [2 * max(lengths[at : at + 2]) for at in range(0, 10, 2)]
    grouped = [sum(expected[at : at + 2]) for start in (0, 5) for at in range(start, start + 5, 2)]
    grouped[2], grouped[5] = expected[4], expected[9]
    assert tokens == grouped


@pytest.mark.parametrize("content", ["", "[]", "nine"])
def test_a_damaged_plan_is_made_again(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    assert Budget(Training(minutes=1.0), tmp_path, lambda: iter(()), 0).steps is None


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
    assert inputs(learnt[7]) == {name: expected[name] for name in ("input_ids", "labels")}
