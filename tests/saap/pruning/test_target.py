"""A size asked for, and the size of the model that is really made."""

import numpy as np
import pytest

from saap import DecodeTime, Footprint, OutOfReach, choose_heads, discover, prune, select, select_for, size_of
from tests.saap.models import mixtures

WIDE = {"intermediate_size": 512, "num_hidden_layers": 8}
ALIGN, PROTECT = 16, (0, -1)
OPTIONS = {"align": ALIGN, "protect": PROTECT}
STEP = ALIGN * 3 * 64  # parameters of a step of channels
CHOICES = [
    {"search": "global"},
    {"search": "global", "direction": "highest"},
    {"search": "global", "kinds": "equal"},
    {"search": "global", "kinds": "mlp"},
    {"search": "uniform"},
    {"search": "uniform_down"},
]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(n_kv=4, num_attention_heads=8, **WIDE)


def scores(groups, seed=0):
    """Heads matter more than channels, as they do in real models."""
    rng = np.random.default_rng(seed)
    return rng.random(len(groups)) * np.where(groups.kind == "attention", 30, 1) * (1 + groups.layer)


@pytest.mark.parametrize("share", [0.97, 0.83, 0.6, 0.45])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_parameters_are_met_to_half_a_step_of_channels(model, choice, share):
    groups = discover(model)
    wanted = int(share * size_of(model).parameters)
    size = Footprint(model, groups).parameters
    keep, ratio = select_for(scores(groups), groups, size, wanted, **OPTIONS, **choice)
    small = prune(model, keep)
    assert abs(size_of(small).parameters - wanted) <= STEP / 2
    plain = select(scores(groups), groups, ratio, **OPTIONS, **choice)
    for layer, kind, index in groups.structures():
        count = int(keep[index].sum())
        if layer in (0, 7):
            assert count == len(index)
        elif kind == "attention":
            assert (keep[index] == plain[index]).all()
        else:
            assert count % ALIGN == 0
            assert abs(count - plain[index].sum()) <= 6 * ALIGN  # single steps, not another plan
            worth = scores(groups)[index] * (-1 if choice.get("direction") == "highest" else 1)
            assert count in (0, len(index)) or worth[keep[index]].min() >= worth[~keep[index]].max()


@pytest.mark.parametrize("form", [None, {"bits": 4, "group_size": 32}, {"bits": 4, "groups": 7}], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_so_are_bytes(model, choice, form):
    groups = discover(model)
    size = Footprint(model, groups, groupwise=form).weight_bytes
    one_step = np.ones(len(groups), bool)
    one_step[np.flatnonzero((groups.layer == 3) & (groups.kind == "mlp"))[:ALIGN]] = False
    wanted = 0.7 * size(np.ones(len(groups), bool))
    keep, _ = select_for(scores(groups), groups, size, wanted, **OPTIONS, **choice)
    assert abs(size(keep) - wanted) <= size(np.ones(len(groups), bool)) - size(one_step)


def test_so_is_a_time(model):
    groups = discover(model)
    time = DecodeTime(groups, [("attention", 0.5, 0.85), ("mlp", 0.25, 0.6), ("mlp", 0.5, 0.8)])
    for choice in CHOICES:
        keep, _ = select_for(scores(groups), groups, time, 1 / 1.25, **OPTIONS, **choice)
        assert 1 / time(keep) == pytest.approx(1.25, rel=0.005)


def test_by_query_heads_too(tiny_llama):
    model = tiny_llama(n_kv=2, num_attention_heads=8, **WIDE)
    choose_heads(model, "query")
    groups = discover(model)
    wanted = 0.6 * size_of(model).parameters
    keep, _ = select_for(scores(groups), groups, Footprint(model, groups).parameters, wanted, **OPTIONS)
    assert abs(size_of(prune(model, keep)).parameters - wanted) <= STEP / 2


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_what_is_out_of_reach_names_the_smallest_there_is(model, choice):
    groups = discover(model)
    size = Footprint(model, groups).parameters
    with pytest.raises(OutOfReach) as error:
        select_for(scores(groups), groups, size, 1.0, **OPTIONS, **choice)
    smallest = error.value.smallest
    for seed in range(3):  # other scores, as those that are not known yet
        keep, _ = select_for(scores(groups, seed), groups, size, smallest, **OPTIONS, **choice)
        assert size_of(prune(model, keep)).parameters <= smallest
    with pytest.raises(OutOfReach):
        select_for(scores(groups), groups, size, smallest - STEP, **OPTIONS, **choice)


def test_a_device_where_narrower_layers_are_no_faster_is_out_of_reach(model):
    groups = discover(model)
    time = DecodeTime(groups, [("attention", 0.5, 1.02), ("mlp", 0.5, 1.0)])
    with pytest.raises(OutOfReach, match="no smaller or faster"):
        select_for(scores(groups), groups, time, 1 / 1.25, **OPTIONS)


@pytest.mark.parametrize("search", ["global", "uniform"])
def test_of_a_mixture_the_plan_comes_near(search):
    model = mixtures.build("qwen3_moe")
    groups = discover(model)
    whole = size_of(model).parameters
    size = Footprint(model, groups).parameters
    keep, _ = select_for(scores(groups), groups, size, 0.75 * whole, align=4, protect=(), search=search)
    largest = groups.costs.max()
    assert abs(size_of(prune(model, keep)).parameters - 0.75 * whole) <= largest * (4 if search == "uniform" else 1)
