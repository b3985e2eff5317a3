"""Statistics against plain autograd and plain second implementations."""

import numpy as np
import pytest
import torch

from saap import SaapError, discover, input_moments, taylor_sums
from saap.models.groups import KINDS, layer_parts
from saap.models.stream import Stream
from saap.scoring.divergence import divergence
from saap.scoring.experts import reap
from tests.saap.models import mixtures


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def inputs(tiny_llama, tokens):
    """(layer, kind) → the inputs of o_proj and down_proj in float64, by running the modules of each layer by name."""
    model, seen = tiny_llama().double(), {}
    for layer, module in enumerate(model.model.layers):
        for kind, linear in (("attention", module.self_attn.o_proj), ("mlp", module.mlp.down_proj)):
            linear.register_forward_pre_hook(
                lambda _, args, key=(layer, kind): seen.update({key: args[0].flatten(0, 1).numpy()})
            )
    with torch.no_grad():
        model(tokens)
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_moments_are_those_of_all_tokens_whatever_the_batch(tiny_llama, tokens, inputs, batch_size):
    found = input_moments(tiny_llama(), tokens, batch_size=batch_size)
    assert found.keys() == inputs.keys()
    for key, x in inputs.items():
        np.testing.assert_allclose(found[key].mean, x.mean(0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[key].variance, x.var(0, ddof=1), rtol=1e-4)
        np.testing.assert_allclose(found[key].norm, np.sqrt((x**2).sum(0)), rtol=1e-4)


def test_a_variance_survives_a_mean_that_dwarfs_it(tiny_llama, tokens):
    model = tiny_llama(mlp_bias=True)
    gate = model.model.layers[2].mlp
    with torch.no_grad():
        gate.gate_proj.weight[7] = 0
        gate.gate_proj.bias[7] = 40.0  # silu(40) = 40, times a small up: mean 40·10⁴, deviation of order 1
        gate.up_proj.bias[7] = 1e4
    found = input_moments(model.double(), tokens, batch_size=2)[2, "mlp"]
    seen = []
    gate.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 7].flatten().numpy()))
    with torch.no_grad():
        model(tokens)
    assert found.mean[7] > 1e5
    np.testing.assert_allclose(found.variance[7], seen[0].var(ddof=1), rtol=1e-6)


def test_taylor_sums_are_those_of_autograd(tiny_llama, tokens):
    """One ordinary backward pass a sample, with gradients of every weight, then sums over named slices."""
    model = tiny_llama()
    sums = taylor_sums(model, tokens, batch_size=2)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())

    oracle = tiny_llama().double()
    first = {name: torch.zeros_like(p) for name, p in oracle.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in oracle.named_parameters()}
    for sample in tokens:
        oracle.zero_grad()
        oracle(sample[None], labels=sample[None]).loss.backward()
        for name, p in oracle.named_parameters():
            first[name] += p.grad / len(tokens)
            second[name] += p.grad**2 / len(tokens)
    wanted = {"vectorize": [], "param_first": [], "param_mix": []}
    for layer, module in enumerate(oracle.model.layers):
        at = f"model.layers.{layer}."
        heads = [("self_attn.q_proj", 0, 32), ("self_attn.k_proj", 0, 16), ("self_attn.v_proj", 0, 16)]
        heads.append(("self_attn.o_proj", 1, 32))
        channels = [("mlp.gate_proj", 0, 1), ("mlp.up_proj", 0, 1), ("mlp.down_proj", 1, 1)]
        for count, slices in ((2, heads), (96, channels)):
            for unit in range(count):
                group = dict.fromkeys(wanted, 0.0)
                for name, axis, width in slices:
                    w = module.get_submodule(name).weight
                    rows = [t.movedim(axis, 0)[unit * width : (unit + 1) * width]
                            for t in (w.detach(), *(s[f"{at}{name}.weight"] for s in (first, second)))]  # fmt: skip
                    wg, wwh = rows[0] * rows[1], rows[0] ** 2 * rows[2]
                    group["vectorize"] += float(wg.sum(1).abs().sum())
                    group["param_first"] += float(wg.abs().sum())
                    group["param_mix"] += float((wg - wwh / 2).abs().sum())
                for name, value in group.items():
                    wanted[name].append(value)
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(sums, name), values, rtol=2e-4, err_msg=name)


def test_the_sums_as_coded_fold_query_heads_as_llm_pruner_does(tiny_llama, tokens):
    """Two KV heads, six query heads: 0, 1, 2 go with the first KV head, its code counts 0, 2, 4 there."""
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2}
    sums, oracle = taylor_sums(tiny_llama(**shape), tokens), tiny_llama(**shape).double()
    oracle(tokens, labels=tokens).loss.backward()
    groups = discover(oracle)
    for layer, module in enumerate(oracle.model.layers):
        of = {
            name: (p.weight * p.weight.grad).detach().abs()
            for name, p in ((n, getattr(module.self_attn, n)) for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
        }
        query = [float(of["q_proj"][i : i + 16].sum() + of["o_proj"][:, i : i + 16].sum()) for i in range(0, 96, 16)]
        shared = [float(of["k_proj"][i : i + 16].sum() + of["v_proj"][i : i + 16].sum()) for i in (0, 16)]
        at = (groups.layer == layer) & (groups.kind == "attention")
        coded = [shared[0] + query[0] + query[2] + query[4], shared[1] + query[1] + query[3] + query[5]]
        served = [shared[0] + sum(query[:3]), shared[1] + sum(query[3:])]
        np.testing.assert_allclose(sums.param_first_as_coded[at], coded, rtol=2e-4)
        np.testing.assert_allclose(sums.param_first[at], served, rtol=2e-4)
        channels = (groups.layer == layer) & (groups.kind == "mlp")
        assert np.array_equal(sums.param_first_as_coded[channels], sums.param_first[channels])


def test_the_statistics_refuse_what_is_not_finite(tiny_llama, tokens):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    for statistic in (input_moments, taylor_sums):
        with pytest.raises(SaapError, match="not finite"):
            statistic(model, tokens)


def test_groups_come_in_the_order_of_discover(tiny_llama):
    """What every criterion relies on: layers in order, attention before mlp, output matrices one a kind."""
    from saap.scoring.statistics import output_matrices

    model = tiny_llama(n_kv=4)
    layers = [(layer, kind) for layer, kind, _ in discover(model).structures()]
    assert [(layer, kind) for layer, kind, *_ in output_matrices(model)] == layers
    assert len(layers) == len(layer_parts(model)) * len(KINDS)


def test_nothing_is_dropped_out_while_a_model_is_measured(tiny_llama, tokens):
    model, plain = tiny_llama(attention_dropout=0.5), tiny_llama()
    found, wanted = (input_moments(each.train(), tokens) for each in (model, plain))
    assert all(np.array_equal(found[key].mean, wanted[key].mean) for key in wanted)
    assert np.abs(divergence(model.train(), plain.train(), tokens)).max() < 1e-6
    passes = [list(Stream(each.train(), tokens, 5).through(0)) for each in (model, plain)]
    assert torch.equal(passes[0][0].out, passes[1][0].out)
    mixture = mixtures.build("qwen3_moe")
    wanted = reap(mixture, tokens)[0]
    for layer in mixture.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = reap(mixture.train(), tokens)[0]
    assert all(np.array_equal(found[layer], wanted[layer]) for layer in wanted)
