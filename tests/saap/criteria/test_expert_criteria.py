"""What ranks experts and their channels, against autograd and the formulas."""

import copy

import numpy as np
import pytest
import torch

from saap import CRITERIA, SaapError, discover, mask_fisher, prune, score, select
from saap.scoring.fisher import mask_gradient
from tasks.criteria import NEEDS
from tests.saap.models.families import IDS, build, logits
from tests.saap.models.mixtures import CASES, WIDTH, E, mixed, plain_experts, random_keep, router_and_experts
from tests.saap.models.mixtures import build as mixture


@pytest.fixture(params=CASES)
def model(request):
    return mixture(request.param)


def by_autograd(model):
    """float64 (samples, N): the gradient of each sample's loss for the mask of every group."""
    exact, gates = copy.deepcopy(model).double(), []

    def gate(count):
        gates.append(torch.ones(count, dtype=torch.double, requires_grad=True))
        return gates[-1]

    def masked(matrix, own):
        matrix.register_forward_pre_hook(
            lambda _, args: (args[0] * own.repeat_interleave(args[0].shape[-1] // len(own)),)
        )

    for layer in exact.model.layers:
        masked(layer.self_attn.o_proj, gate(2))
        if mixed(layer):
            _, experts = router_and_experts(layer)
            experts.forward = plain_experts(experts, gate(E), gate(E * WIDTH).view(E, -1))
        else:
            masked(layer.mlp.down_proj, gate(96))
    losses = [exact(ids, labels=ids).loss for ids in IDS[:, None]]
    return np.stack([torch.cat(torch.autograd.grad(loss, gates)).numpy() for loss in losses])


def test_fisher_information_and_gradients_are_those_of_masks_in_autograd(model):
    expected = by_autograd(model)
    for batch_size in (1, 2):
        for found, wanted in (
            (mask_fisher(model, IDS, batch_size=batch_size), (expected**2).mean(0)),
            (mask_gradient(model, IDS, batch_size=batch_size), expected.mean(0)),
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())


def test_reap_is_the_mean_of_router_weight_times_norm_over_an_experts_tokens(model):
    groups, experts, channels = discover(model), {}, {}
    for number, layer in enumerate(model.model.layers):
        if not mixed(layer):
            continue

        def see(module, args, number=number):
            x, index, weights = args
            nothing = plain_experts(module, torch.ones(E), torch.zeros(E, WIDTH))(x, index, weights)  # gpt-oss's biases
            for e in range(E):
                goes, one = (index == e).any(1), torch.zeros(E)
                one[e] = 1
                whole = plain_experts(module, one, torch.ones(E, WIDTH))(x, index, weights)[goes]
                experts[number, e] = whole.norm(dim=1).mean().item() if goes.any() else 0.0
                for channel in range(WIDTH):
                    inner = torch.zeros(E, WIDTH)
                    inner[e, channel] = 1
                    adds = (plain_experts(module, torch.ones(E), inner)(x, index, weights) - nothing)[goes]
                    channels[number, e, channel] = adds.norm(dim=1).mean().item() if goes.any() else 0.0

        router_and_experts(layer)[1].register_forward_pre_hook(see)
    logits(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    found = CRITERIA["reap"](model, IDS)
    whole = found[groups.kind == "expert"]
    inside = np.concatenate([found[index.ravel()] for _, index in groups.mixtures().values()])
    np.testing.assert_allclose(whole, list(experts.values()), rtol=1e-4)
    np.testing.assert_allclose(inside - max(whole) - 1, list(channels.values()), rtol=1e-4, atol=1e-5)
    rest = groups.kind == "attention"
    for number, layer in enumerate(model.model.layers):
        rest |= (groups.layer == number) & (not mixed(layer))
    assert whole.max() < inside.min() <= inside.max() < found[rest].min()


def test_magnitude_is_the_mean_weight_of_an_expert_and_of_each_of_its_channels(model):
    groups, found = discover(model), CRITERIA["magnitude"](model)
    for number, (experts, channels) in groups.mixtures().items():
        router, module = router_and_experts(model.model.layers[number])
        for e in range(E):
            gate_up, down = module.gate_up_proj[e].detach().abs(), module.down_proj[e].detach().abs()
            if hasattr(module, "down_proj_bias"):
                rows = torch.stack([gate_up[:, 0::2].mean(0), gate_up[:, 1::2].mean(0), down.mean(1)])
            else:
                rows = torch.stack([gate_up[:WIDTH].mean(1), gate_up[WIDTH:].mean(1), down.mean(0)])
            np.testing.assert_allclose(found[channels[e]], rows.mean(0), rtol=1e-5)
            every = torch.cat([gate_up.flatten(), down.flatten(), router.weight[e].detach().abs()])
            assert found[experts[e]] == pytest.approx(every.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs.experts])
def test_every_criterion_that_says_so_ranks_experts_for_a_plan(name, model):
    six = IDS.repeat(6, 1)[:6]
    known = {"fisher": lambda: mask_fisher(model, six), "tokens": lambda: six, "seed": lambda: 0, "ratio": lambda: 0.2}
    known |= {
        "score": lambda: score(model, IDS),
        "protect": lambda: (0,),
        "align": lambda: 4,
        "kinds": lambda: "pooled",
        "cuts": lambda: (0.05, 0.1),
        "take_heads": lambda: "measured",
        "ridge": lambda: "held_out",
    }
    needs = NEEDS[name]
    found = CRITERIA[name](model, **{need: known[need]() for need in (*needs.statistics, *needs.options)})
    assert np.isfinite(found).all()
    for search in ("global", "uniform", "uniform_down"):
        kinds = "pooled" if search == "global" or name != "reap" else "mlp"
        keep = select(found, discover(model), 0.2, protect=(0,), align=4, search=search, kinds=kinds)
        assert logits(prune(model, keep)).isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name, needs in NEEDS.items() if not needs.experts and needs.statistics in ((), ("tokens",))]
)
def test_the_others_refuse_them(name):
    known = {"tokens": IDS, "seed": 0, "ratio": 0.2, "protect": (0,), "align": 4, "kinds": "pooled"}
    needs = NEEDS[name]
    with pytest.raises(SaapError, match="experts of a mixtral"):
        CRITERIA[name](mixture("mixtral"), **{need: known[need] for need in (*needs.statistics, *needs.options)})


def test_reap_refuses_a_model_without_experts():
    with pytest.raises(SaapError, match="has no experts"):
        CRITERIA["reap"](build("llama"), IDS)


def test_what_an_earlier_cut_removed_goes_first(model):
    fisher = mask_fisher(model, IDS)
    plain = CRITERIA["saap_plus"](model, fisher, IDS, protect=(0,), align=4)
    keep = select(plain, discover(model), 0.15, protect=(0,), align=4)
    again = CRITERIA["saap_plus"](model, fisher, IDS, cuts=(0.15,), protect=(0,), align=4)
    assert again[~keep].max() < again[keep].min()
    assert sorted(again) == list(range(len(again)))
    assert (np.argsort(again[keep]) != np.argsort(plain[keep])).any()
    assert mask_fisher(prune(model, random_keep(model)), IDS).min() >= 0
