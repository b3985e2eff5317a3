"""The time of a plan, from given times: nothing is measured here."""

import numpy as np
import pytest

from saap import DecodeTime, discover, narrowed, prune
from tests.saap.models.families import CASES, LLAMAS, build

MEASURED = [("attention", 0.5, 0.9), ("mlp", 1 / 3, 0.6), ("mlp", 2 / 3, 0.85)]


def kept(groups, layers, attention, channels):
    """The plan that keeps so many of each in these layers."""
    count = {"attention": attention, "mlp": channels}
    keep = np.ones(len(groups), bool)
    for layer, kind, index in groups.structures():
        if layer in layers:
            keep[index[count[kind] :]] = False
    return keep


def test_a_plan_takes_what_was_measured_where_it_was_measured_and_a_line_between(tiny_llama):
    groups = discover(tiny_llama())  # six layers of 2 KV heads and 96 channels
    time, every = DecodeTime(groups, MEASURED), range(6)
    for attention, channels, expected in [
        (2, 96, 1.0), (1, 96, 0.9), (2, 32, 0.6), (2, 64, 0.85), (2, 48, 0.725), (2, 80, 0.925), (1, 64, 0.75),
        (2, 16, 0.475), (2, 0, 0.35), (0, 96, 0.8),
    ]:  # fmt: skip
        assert time(kept(groups, every, attention, channels)) == pytest.approx(expected), (attention, channels)


def test_each_of_equal_layers_saves_an_equal_part(tiny_llama):
    groups = discover(tiny_llama())
    time = DecodeTime(groups, MEASURED)
    assert time(kept(groups, [2], 1, 32)) == pytest.approx(1 - (0.1 + 0.4) / 6)
    assert time(kept(groups, [0, 1, 5], 1, 32)) == pytest.approx(1 - (0.1 + 0.4) / 2)


def test_noise_makes_no_narrower_layer_slower(tiny_llama):
    groups = discover(tiny_llama())
    time = DecodeTime(groups, [("attention", 0.5, 1.07), ("mlp", 1 / 3, 0.9), ("mlp", 2 / 3, 0.8)])
    found = [time(kept(groups, range(6), 2, channels)) for channels in (96, 80, 64, 48, 32, 0)]
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.8, 0.8, 0.8])
    assert time(kept(groups, range(6), 1, 96)) == 1.0


@pytest.mark.parametrize("case", CASES | LLAMAS)
def test_the_plans_to_measure_narrow_one_kind_in_every_layer_and_can_be_pruned(case):
    model = build(case)
    groups = discover(model)
    plans = list(narrowed(groups, align=8))
    assert {kind for kind, *_ in plans} <= {"attention", "mlp"}
    assert "mlp" in {kind for kind, *_ in plans}
    assert len({(kind, share) for kind, share, _ in plans}) == len(plans)
    for kind, share, keep in plans:
        assert 0 < share < 1
        assert keep[groups.kind != kind].all()
        for _, own, index in groups.structures():
            if own == kind:
                assert 0 < keep[index].sum() < len(index)
                assert kind == "attention" or keep[index].sum() % 8 == 0
        prune(model, keep)
