import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saap import Groups, SaapError, choose_heads, discover, prune, removed_share, select
from saap.pruning.plan import SEARCHES

COST = {"attention": 4096, "mlp": 192}


def make_groups(layers, heads, channels):
    per_layer = ["attention"] * heads + ["mlp"] * channels
    kind = np.array(per_layer * layers)
    unit = np.tile([*range(heads), *range(channels)], layers).astype(np.int32)
    layer = np.repeat(np.arange(layers, dtype=np.int32), heads + channels)
    return Groups(layer, kind, unit, np.where(kind == "attention", COST["attention"], COST["mlp"]))


def layers(groups):
    for layer in range(groups.layer.max() + 1):
        for kind in COST:
            yield layer, kind, np.flatnonzero((groups.layer == layer) & (groups.kind == kind))


def random_case(seed):
    """Groups, scores, align, protected layers, and a ratio that heads and whole steps can meet."""
    rng = np.random.default_rng(seed)
    groups = make_groups(int(rng.integers(5, 10)), int(rng.integers(1, 9)), int(rng.integers(64, 200)))
    score = rng.normal(size=len(groups)) * rng.choice([1.0, 1e-6, 1e6])
    align = int(rng.choice([1, 4, 8, 32]))
    protect = ((0, 1, 2, -1), (0,), (-1, 1), ())[seed % 4]
    least = sum((1 if kind == "attention" else align) * COST[kind] * (layer not in whole(groups, protect))
                for layer, kind, _ in layers(groups))  # fmt: skip
    reach = (free(groups, protect) - least) / groups.parameters.sum()
    return groups, score, align, protect, float(rng.uniform(0.02, 0.9)) * reach


def whole(groups, protect):
    layers = int(groups.layer.max()) + 1
    return {p + layers if p < 0 else p for p in protect}


def free(groups, protect):
    return sum(int(groups.parameters[i].sum()) for layer, _, i in layers(groups) if layer not in whole(groups, protect))


SEEDS = range(24)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_plan_keeps_protected_blocks_whole_the_best_of_each_block_and_whole_steps(seed, search):
    groups, score, align, protect, ratio = random_case(seed)
    keep = select(score, groups, ratio, search=search, protect=protect, align=align)
    assert keep.dtype == bool
    for layer, kind, index in layers(groups):
        kept, gone = score[index][keep[index]], score[index][~keep[index]]
        if layer in whole(groups, protect):
            assert not len(gone)
        if len(gone):
            assert kept.min() > gone.max()
        if kind == "attention":
            assert len(kept) >= 1
        else:
            assert len(kept) >= align
            assert len(kept) % align == 0 or not len(gone)


@pytest.mark.parametrize("seed", SEEDS)
def test_global_search_meets_the_budget_within_half_a_step_a_block(seed):
    groups, score, align, protect, ratio = random_case(seed)
    keep = select(score, groups, ratio, protect=protect, align=align)
    removed = int(groups.parameters[~keep].sum())
    free_blocks = int(groups.layer.max()) + 1 - len(whole(groups, protect))
    # a cut between two whole groups misses by half a group at most
    allowed = free_blocks * align / 2 * COST["mlp"] + max(COST.values()) / 2
    assert abs(removed - ratio * groups.parameters.sum()) <= allowed
    assert removed_share(groups, keep) == pytest.approx(removed / groups.parameters.sum(), rel=1e-12)


@pytest.mark.parametrize("remainder", [1, 15, 17, 31])
def test_rounding_to_whole_steps_meets_the_budget_when_every_block_has_the_same_remainder(remainder):
    groups = make_groups(8, 2, 160)
    # heads last to go; the same channels first to go everywhere
    score = np.where(groups.kind == "attention", 1e3, groups.unit) + 1e-3 * groups.layer
    budget = 8 * (160 - 96 - remainder) * COST["mlp"]
    keep = select(score, groups, budget / groups.parameters.sum(), protect=(), align=32)
    assert abs(groups.parameters[~keep].sum() - budget) <= 32 / 2 * COST["mlp"]


@pytest.mark.parametrize("seed", SEEDS)
def test_global_search_in_single_channels_equals_removing_one_after_another(seed):
    groups, score, _, protect, ratio = random_case(seed)
    keep, budget = np.ones(len(groups), bool), ratio * groups.parameters.sum()
    left = {(layer, kind): len(index) for layer, kind, index in layers(groups)}
    removed = 0
    for i in sorted(range(len(groups)), key=lambda i: score[i]):
        module = (int(groups.layer[i]), str(groups.kind[i]))
        if module[0] in whole(groups, protect) or left[module] == 1:
            continue
        if abs(removed + groups.parameters[i] - budget) >= abs(removed - budget):
            break
        removed += groups.parameters[i]
        left[module] -= 1
        keep[i] = False
    assert (select(score, groups, ratio, protect=protect, align=1) == keep).all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("search", SEARCHES)
def test_channels_only_leaves_every_head_and_meets_the_budget(seed, search):
    groups, align = make_groups(6, 4, 256), (1, 8, 32)[seed % 3]
    score = np.random.default_rng(seed).normal(size=len(groups)) - 5 * (groups.kind == "attention")
    keep = select(score, groups, 0.25, search=search, kinds="mlp", protect=(0,), align=align)
    assert keep[groups.kind == "attention"].all()
    assert abs(groups.parameters[~keep].sum() - 0.25 * groups.parameters.sum()) <= 5 * align / 2 * COST["mlp"]


@pytest.mark.parametrize("seed", range(12))
def test_an_equal_share_takes_of_each_kind_what_its_size_says_whatever_the_scores_scales(seed):
    groups, align = make_groups(7, 8, 256), (1, 8, 32)[seed % 3]
    score = np.random.default_rng(seed).normal(size=len(groups)) * np.where(groups.kind == "attention", 1e-3, 1e3)
    keep = select(score, groups, 0.3, kinds="equal", protect=(0, -1), align=align)
    heads = groups.kind == "attention"
    share = 0.3 * 7 / 5  # of the five free layers
    removed, wanted = (groups.parameters[heads & ~keep].sum(), share * groups.parameters[heads].sum() * 5 / 7)
    assert abs(removed - wanted) <= COST["attention"] / 2
    assert abs(groups.parameters[~keep].sum() - 0.3 * groups.parameters.sum()) <= (5 * align + 1) / 2 * COST["mlp"]
    order = np.argsort(score[heads & free_groups(groups)])
    gone = ~keep[heads & free_groups(groups)][order]
    assert gone.sum() == np.flatnonzero(gone).max() + 1  # across layers: the lowest heads of all


def free_groups(groups):
    return (groups.layer > 0) & (groups.layer < groups.layer.max())


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_search_removes_the_same_share_of_every_free_block(seed):
    rng = np.random.default_rng(seed)
    groups = make_groups(6, int(rng.integers(2, 9)), 256)
    align, protect = int(rng.choice([1, 8, 32])), (0, -1)
    ratio = float(rng.uniform(0.05, 0.4))
    score = rng.normal(size=len(groups))
    keep = select(score, groups, ratio, search="uniform", protect=protect, align=align)
    wanted = ratio * groups.parameters.sum() / 4
    for layer in range(1, 5):
        removed = groups.parameters[(groups.layer == layer) & ~keep].sum()
        assert abs(removed - wanted) <= align / 2 * COST["mlp"]


def kept_of(groups, keep, layer, kind):
    return int(keep[(groups.layer == layer) & (groups.kind == kind)].sum())


@pytest.mark.parametrize(
    ("layers", "heads", "channels", "costs", "ratio", "wanted"),
    [
        # SmolLM2-135M. 0.2 of 30 layers is 816,679 parameters in each of 26: no whole head of 3 at 23 %, 472.6 channels
        (30, 3, 1536, (294912, 1728), 0.2, (3, 1063)),
        # 0.5 is 2,041,698: 57.7 % of 3 heads is one, and the other 1,746,786 are 1010.9 channels
        (30, 3, 1536, (294912, 1728), 0.5, (2, 525)),
        # LLaMA-7B, 25 % of layers 4–29 (LLM-Pruner's script)
        (32, 32, 11008, (4 * 128 * 4096, 3 * 4096), 0.25 * 26 / 32, (24, 8256)),
    ],
)
def test_heads_are_rounded_down_as_worked_out_by_hand(layers, heads, channels, costs, ratio, wanted):
    groups = make_groups(layers, heads, channels)
    groups.parameters[:] = np.where(groups.kind == "attention", *costs)
    protect = (0, 1, 2, -1) if layers == 30 else (0, 1, 2, 3, -1, -2)
    score = np.random.default_rng(0).normal(size=len(groups))
    keep = select(score, groups, ratio, search="uniform_down", protect=protect, align=1)
    for layer in range(layers):
        counts = kept_of(groups, keep, layer, "attention"), kept_of(groups, keep, layer, "mlp")
        assert counts == ((heads, channels) if layer in whole(groups, protect) else wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_rounded_down_are_those_of_one_share_of_heads_and_channels(seed):
    """Wanda-sp and LoRAPrune remove int(s·heads) and int(s·channels) of a layer; so do we for what that removes."""
    rng = np.random.default_rng(seed)
    groups, s = make_groups(6, heads := int(rng.integers(1, 33)), 256), float(rng.uniform(0.05, 0.9))
    gone = min(int(s * heads), heads - 1), int(s * 256)
    ratio = 4 * (gone[0] * COST["attention"] + gone[1] * COST["mlp"]) / groups.parameters.sum()
    keep = select(rng.normal(size=len(groups)), groups, ratio, search="uniform_down", protect=(0, -1), align=1)
    for layer in range(1, 5):
        assert kept_of(groups, keep, layer, "attention") == heads - gone[0]
        assert kept_of(groups, keep, layer, "mlp") == 256 - gone[1]


@pytest.mark.parametrize("search", ["global", "uniform"])
@pytest.mark.parametrize("seed", range(8))
def test_highest_removes_the_other_end_of_the_score(seed, search):
    groups, score, align, protect, ratio = random_case(seed)
    settings = {"search": search, "protect": protect, "align": align}
    keep = select(score, groups, ratio, direction="highest", **settings)
    assert (keep == select(-score, groups, ratio, **settings)).all()
    for _, _, index in layers(groups):
        if not keep[index].all():
            assert score[index][keep[index]].max() < score[index][~keep[index]].min()


@pytest.mark.parametrize("search", ["global", "uniform"])
@pytest.mark.parametrize("short", [0.99, 1.0, 1.05], ids=["minima left", "all free layers", "beyond"])
def test_a_ratio_out_of_reach_is_refused(search, short):
    groups = make_groups(6, 2, 96)
    score = np.random.default_rng(0).normal(size=len(groups))
    ratio = short * free(groups, (0, 1, 2, -1)) / groups.parameters.sum()
    with pytest.raises(SaapError, match=r"ratio .* cannot be reached"):
        select(score, groups, float(ratio), search=search)


@pytest.mark.parametrize(
    ("ratio", "settings"),
    [
        (1.2, {}),
        (1.0, {}),
        (0.0, {}),
        (-0.1, {}),
        (float("nan"), {}),
        (0.1, {"protect": (6,)}),
        (0.1, {"protect": (-7,)}),
        (0.1, {"align": 0}),
        (0.1, {"search": "local"}),
        (0.1, {"direction": "lower"}),
        (0.1, {"kinds": "heads"}),
        (0.3, {"kinds": "mlp"}),  # two of six layers are free
    ],
)
def test_bad_arguments_are_refused(ratio, settings):
    groups = make_groups(6, 2, 96)
    with pytest.raises(SaapError):
        select(np.arange(float(len(groups))), groups, ratio, **settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    groups = make_groups(6, 2, 96)
    score = np.arange(float(len(groups)))
    score[5] = bad
    with pytest.raises(SaapError, match="not finite"):
        select(score, groups, 0.1)


@pytest.mark.parametrize("search", ["global", "uniform"])
@pytest.mark.parametrize("seed", range(6))
def test_query_heads_go_evenly_under_each_kv_head_the_best_of_each_stay(seed, search):
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=(shared := int(rng.integers(1, 4))) * 4,
            num_key_value_heads=shared,
            head_dim=4,
        )
    )
    choose_heads(model, "query")
    groups = discover(model)
    score = rng.normal(size=len(groups))
    ratio = float(rng.uniform(0.1, 0.5))
    keep = select(score, groups, ratio, search=search, protect=(0,), align=4)
    for layer in range(5):
        index = np.flatnonzero((groups.layer == layer) & (groups.kind == "attention"))
        stays, scores = keep[index].reshape(shared, 4), score[index].reshape(shared, 4)
        assert len(set(stays.sum(1))) == 1
        assert stays.sum(1)[0] >= 1
        for own, kept in zip(scores, stays, strict=True):
            assert not kept.any() or kept.all() or own[kept].min() > own[~kept].max()
    bundle = groups.parameters[0] * shared + 4 * groups.parameters[-1]
    allowed = 0.5 * bundle * (5 if search == "uniform" else 2) / groups.parameters.sum()
    assert removed_share(groups, keep) == pytest.approx(ratio, abs=allowed)
    assert sum(p.numel() for p in prune(model, keep).parameters()) == sum(p.numel() for p in model.parameters()) - int(
        groups.parameters[~keep].sum()
    )


@pytest.mark.parametrize(
    ("ratio", "settings"),
    [(0.1, {}), (0.1, {"protect": ()}), (0.95, {"protect": ()}), (0.9, {"protect": (), "kinds": "equal"})],
)
def test_channels_make_up_for_query_heads_that_a_layer_must_keep(ratio, settings):
    """Llama 3.2 1B, where a query head stays under each of eight KV heads; its heads are worth nothing."""
    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, **shape))
    choose_heads(model, "query")
    groups = discover(model)
    score = np.random.default_rng(0).random(len(groups)) - (groups.kind == "attention")
    keep = select(score, groups, ratio, **settings)
    assert removed_share(groups, keep) == pytest.approx(ratio, abs=0.002)  # a bundle of a layer is 0.0022
    assert keep[groups.kind == "attention"].reshape(16, 8, 4).any(2).all()
    with pytest.raises(SaapError, match=r"0\.985 cannot be reached.* at most 0\.961"):
        select(score, groups, 0.985, protect=())
