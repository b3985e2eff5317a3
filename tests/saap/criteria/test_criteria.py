"""Each criterion against a few lines of numpy written from its paper's formula, and on a planted problem."""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import saap
from saap import CRITERIA, choose_heads, discover, input_moments, select, taylor_sums
from saap.models.stream import Stream
from tasks.config import Criterion
from tasks.criteria import NEEDS

SEED = 5


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 512, (6, 16), generator=torch.Generator().manual_seed(2))


def statistics_of(model, tokens):
    return {
        "score": lambda: saap.score(model, tokens),
        "gradients": lambda: taylor_sums(model, tokens),
        "activations": lambda: input_moments(model, tokens),
        "fisher": lambda: saap.mask_fisher(model, tokens),
        "tokens": lambda: tokens,
        "seed": lambda: SEED,
        "variant": lambda: "param_mix",
        "query_heads": lambda: "as_coded",
        "ratio": lambda: 0.12,
        "kinds": lambda: "pooled",
        "cuts": lambda: (0.1, 0.2),
        "take_heads": lambda: "pooled",
        "ridge": lambda: 1.0,
        "protect": lambda: (0, -1),
        "align": lambda: 8,
    }


def ranking(name, model, tokens):
    known = statistics_of(model, tokens)
    needs = NEEDS[name]
    return CRITERIA[name](model, **{need: known[need]() for need in (*needs.statistics, *needs.options)})


def test_the_tables_of_criteria_agree():
    names = Criterion.model_fields["name"].annotation.__args__
    assert set(names) == {"saap", *CRITERIA} == {"saap", *NEEDS}
    for name, function in CRITERIA.items():
        parameters = list(inspect.signature(function).parameters)
        assert parameters == ["model", *NEEDS[name].statistics, *NEEDS[name].options], name


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"reap"}))  # which wants experts: test_experts.py
def test_a_ranking_has_a_finite_number_a_group_and_leaves_the_model_alone(name, tiny_llama, tokens):
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score = ranking(name, model, tokens)
    assert score.shape == (len(discover(model)),)
    assert np.isfinite(score).all()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["magnitude", "loraprune", "lorashear", "saap_gates"])
def test_a_weight_that_is_not_a_number_is_named(name, tiny_llama, tokens):
    model, fisher = tiny_llama(), saap.mask_fisher(tiny_llama(), tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    known, needs = {**statistics_of(model, tokens), "fisher": lambda: fisher}, NEEDS[name]
    with pytest.raises(saap.SaapError, match=r"not finite: neither is model\.layers\.0\.mlp\.up_proj\.weight"):
        CRITERIA[name](model, **{need: known[need]() for need in (*needs.statistics, *needs.options)})


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random", "reap"}))
def test_channels_and_heads_made_useless_are_found(name, tiny_llama, tokens):
    """A third of the channels and one KV head of each free layer get weights a thousand times smaller."""
    model = tiny_llama(n_kv=4)
    planted = np.zeros(len(discover(model)), bool)
    with torch.no_grad():
        for layer, kind, index in discover(model).structures():
            module = model.model.layers[layer]
            if layer not in (2, 3, 4):
                continue
            if kind == "mlp":
                useless = np.arange(layer, 96, 3)
                for linear in (module.mlp.gate_proj, module.mlp.up_proj):
                    linear.weight[useless] *= 1e-3
                module.mlp.down_proj.weight[:, useless] *= 1e-3
            else:
                useless = np.array([layer - 1])
                rows = slice(16 * (layer - 1), 16 * layer)
                for linear in (module.self_attn.q_proj, module.self_attn.k_proj, module.self_attn.v_proj):
                    linear.weight[rows] *= 1e-3
                module.self_attn.o_proj.weight[:, rows] *= 1e-3
            planted[index[useless]] = True
    groups = discover(model)
    score = ranking(name, model, tokens)
    for _, _, index in groups.structures():
        if planted[index].any() and name != "saap_gates":  # its gates are trained together and only say who goes
            assert score[index][planted[index]].max() < score[index][~planted[index]].min()
    ratio = groups.parameters[planted].sum() / groups.parameters.sum()
    keep = select(score, groups, ratio, search=NEEDS[name].search, protect=(0, 1, -1), align=1)
    assert (~keep == planted).mean() > 0.95


def columns(model):
    """(layer, kind, weight of the output matrix in float64, columns a group) by name, heads before channels."""
    for layer, module in enumerate(model.model.layers):
        yield layer, "attention", module.self_attn.o_proj.weight.detach().double().numpy(), 64 // 2
        yield layer, "mlp", module.mlp.down_proj.weight.detach().double().numpy(), 1


def collect(model, tokens):
    seen = {}
    for layer, module in enumerate(model.model.layers):
        for kind, linear in (("attention", module.self_attn.o_proj), ("mlp", module.mlp.down_proj)):
            linear.register_forward_pre_hook(
                lambda _, args, key=(layer, kind): seen.update({key: args[0].flatten(0, 1).double().numpy()})
            )
    with torch.no_grad():
        model(tokens)
    return seen


def test_wanda_sp_is_the_mean_of_weight_times_input_norm_behind_what_it_has_pruned(tiny_llama, tokens):
    """Layer after layer: a copy with the layers before it pruned gives the inputs; int(s·H) heads and channels go."""
    model, wanted = tiny_llama(n_kv=4), []
    groups = discover(model)
    keep = np.ones(len(groups), bool)
    for layer in range(6):
        masked = saap.mask(model, keep)
        x = collect(masked, tokens)
        for at, kind, w, width in columns(masked):
            if at != layer:
                continue
            width //= 2 if kind == "attention" else 1  # no grouped queries here
            metric = (np.abs(w) * np.linalg.norm(x[layer, kind], axis=0)).mean(0).reshape(-1, width).sum(1)
            wanted += list(metric)
            index = np.flatnonzero((groups.layer == layer) & (groups.kind == kind))
            if layer not in (0, 5):
                keep[index[np.argsort(metric)[: int(0.5 * len(metric))]]] = False
    ratio = groups.parameters[~keep].sum() / groups.parameters.sum()
    limits = {"protect": (0, -1), "align": 1}
    score = CRITERIA["wanda_sp"](model, tokens, ratio, **limits)
    np.testing.assert_allclose(score, wanted, rtol=1e-4)
    assert np.array_equal(select(score, groups, ratio, search="uniform_down", **limits), keep)
    assert not np.allclose(score, CRITERIA["wanda_sp"](model, tokens, ratio / 8, **limits), rtol=1e-3)


def test_flap_is_the_standardised_fluctuation_of_the_inputs_squared_for_attention(tiny_llama, tokens):
    x = collect(tiny_llama(), tokens)
    wanted = []
    for layer, kind, w, width in columns(tiny_llama()):
        inputs = x[layer, kind]
        m = ((inputs - inputs.mean(0)) ** 2).sum(0) / (len(inputs) - 1) * np.linalg.norm(w, axis=0) ** 2
        m = m**2 if kind == "attention" else m
        z = (m - m.mean()) / np.sqrt(((m - m.mean()) ** 2).sum() / (len(m) - 1))
        wanted += [z[start : start + width].mean() for start in range(0, w.shape[1], width)]
    np.testing.assert_allclose(ranking("flap", tiny_llama(), tokens), wanted, rtol=1e-3, atol=1e-5)


def test_llm_pruner_gives_the_variant_it_is_asked_for(tiny_llama, tokens):
    model = tiny_llama()
    sums = taylor_sums(model, tokens)
    for variant in ("vectorize", "param_first", "param_mix"):
        coded = CRITERIA["llm_pruner"](model, sums, variant)
        served = CRITERIA["llm_pruner"](model, sums, variant, "served")
        assert np.array_equal(coded, getattr(sums, f"{variant}_as_coded"))
        assert np.array_equal(served, getattr(sums, variant))
        assert not np.array_equal(coded, served)
    with pytest.raises(saap.SaapError, match="variant"):
        CRITERIA["llm_pruner"](model, sums, "element")


def test_hywia_gives_each_group_its_own_mix(tiny_llama, tokens):
    """Where the two importances agree the mix does not matter; where they differ the larger weighs more than half."""
    model = tiny_llama()
    groups = discover(model)
    rng = np.random.default_rng(0)
    vector = rng.uniform(0.5, 2, (3, len(groups))).astype(np.float32)
    same = CRITERIA["hywia"](model, (vector, 7 * vector))
    for _, _, index in groups.structures():
        mean = vector[:, index].mean(0, dtype=float)
        np.testing.assert_allclose(same[index], mean / mean.mean(), rtol=1e-5)
    element = rng.uniform(0.5, 2, vector.shape).astype(np.float32)
    mixed = CRITERIA["hywia"](model, (vector, element))
    for _, _, index in groups.structures():
        c, f = (v[:, index].mean(0, dtype=float) / v[:, index].mean(0, dtype=float).mean() for v in (vector, element))
        assert (mixed[index] >= (c + f) / 2 - 1e-9).all()
        assert (mixed[index] <= np.maximum(c, f) + 1e-9).all()


def test_gisp_ranks_what_is_left_after_each_step_and_leaves_what_went_first_in_the_order(tiny_llama, tokens):
    """Two steps of a hundredth: gradients of gates by autograd, on the whole model and on what the first step left."""
    model, gradients = tiny_llama(n_kv=4), []
    groups = discover(model)
    score = CRITERIA["gisp"](model, tokens, 0.02, protect=(0, -1))
    assert sorted(score) == list(range(len(groups)))
    gone = np.argsort(score)[:40]
    for keep in (np.ones(len(groups), bool), None):
        if keep is None:
            first = np.abs(gradients[0])
            for _, _, index in groups.structures():
                first[index] /= first[index].mean()
            keep = select(first, groups, 0.01, protect=(0, -1), align=1)
            assert set(np.flatnonzero(~keep)) == set(gone[: (~keep).sum()])
        gates = [torch.ones(len(index), requires_grad=True) for *_, index in groups.structures()]
        masked, handles = saap.mask(model, keep), []
        for gate, (layer, kind, _) in zip(gates, groups.structures(), strict=True):
            module = masked.model.layers[layer]
            linear, width = (module.self_attn.o_proj, 16) if kind == "attention" else (module.mlp.down_proj, 1)
            handles.append(linear.register_forward_pre_hook(
                lambda _, args, gate=gate, width=width: (args[0] * gate.repeat_interleave(width),)))  # fmt: skip
        masked(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([gate.grad for gate in gates]).double().numpy())
    again = np.abs(gradients[1])
    for _, _, index in groups.structures():
        again[index[keep[index]]] /= again[index[keep[index]]].mean()
    rest = np.flatnonzero(keep)
    assert np.array_equal(rest[np.argsort(again[rest])], np.argsort(score)[(~keep).sum() :])


def test_magnitude_is_the_mean_absolute_weight_and_random_repeats_itself(tiny_llama, tokens):
    model = tiny_llama()
    score, groups = ranking("magnitude", model, tokens), discover(model)
    mlp = model.model.layers[3].mlp
    weights = torch.cat([mlp.gate_proj.weight[11], mlp.up_proj.weight[11], mlp.down_proj.weight[:, 11]])
    at = np.flatnonzero((groups.layer == 3) & (groups.kind == "mlp") & (groups.unit == 11))[0]
    assert score[at] == pytest.approx(float(weights.detach().abs().mean()), rel=1e-5)
    random = CRITERIA["random"]
    assert np.array_equal(random(model, 1), random(model, 1))
    assert not np.array_equal(random(model, 1), random(model, 2))


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"reap"}))  # which wants experts: test_experts.py
def test_weights_that_accelerate_keeps_elsewhere_are_fetched_or_the_criterion_says_it_cannot(name, tiny_llama, tokens):
    away = cpu_offload(tiny_llama(), execution_device="cpu")
    assert away.model.layers[2].mlp.down_proj.weight.is_meta
    if name in ("saap_plus", "saap_gates", "llm_pruner", "wanda_sp", "gisp", "loraprune", "lorashear"):
        with pytest.raises(saap.SaapError, match="all on its device"):
            ranking(name, away, tokens)
    else:
        np.testing.assert_allclose(ranking(name, away, tokens), ranking(name, tiny_llama(), tokens), rtol=1e-5)


def test_wanda_sp_goes_on_behind_the_query_heads_that_the_plan_removes(tiny_llama, tokens, monkeypatch):
    model, through = tiny_llama(hidden_size=128, num_attention_heads=8), Stream.through
    choose_heads(model, "query")
    groups = discover(model)
    silent = np.zeros(len(groups), bool)

    def watched(self, layer, without=None):
        for kind, units in (without or {}).items():
            silent[np.flatnonzero((groups.layer == layer) & (groups.kind == kind))[units]] = True
        return through(self, layer, without)

    monkeypatch.setattr(Stream, "through", watched)
    limits = {"protect": (0, -1), "align": 8}
    score = CRITERIA["wanda_sp"](model, tokens, 0.4, **limits)
    keep = select(score, groups, 0.4, search="uniform_down", **limits)
    assert not keep[groups.kind == "attention"].all()
    assert np.array_equal(silent, ~keep)
