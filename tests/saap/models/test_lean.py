"""Norms, MLPs and attention that keep less for a backward pass: the gradients of transformers' own, in less memory."""

import copy
import weakref

import numpy as np
import pytest
import torch

import saap
from saap.models.lean import ATTENTION, _is_gated, _offset, again, attending, fastest_attention, lean
from saap.scoring.backward import watch_gradients
from tests.saap.models.families import CASES, IDS, build

BATCH = torch.cat([IDS] * 8)
MASK = torch.ones_like(BATCH)
MASK[::2, :4] = 0  # padded on the left


def logits_and_gradient(model, mask=None):
    """Of the last states and of the embeddings, by autograd alone."""
    torch.manual_seed(0)
    states = model.get_input_embeddings()(BATCH).detach().requires_grad_()
    last = model.base_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
    last.backward(torch.randn(last.shape).to(last.dtype))
    return last.detach(), states.grad


def replaced(model):
    return {type(m).__name__ for m in model.modules() if "forward" in vars(m)}


def kept_bytes(model, ids=BATCH):
    """Bytes that a forward pass keeps for its backward, beside the weights."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in known:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t  # stays alive with the graph, so no address is met twice

    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model(inputs_embeds=states, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("case", CASES)
def test_every_family_has_the_states_and_gradients_of_plain_autograd(case):
    model = build(case).requires_grad_(False).eval()
    states, gradient = logits_and_gradient(model)
    with lean(model):
        lean_states, lean_gradient = logits_and_gradient(model)
        found = replaced(model)
    torch.testing.assert_close(lean_states, states, rtol=1e-4, atol=1e-5)
    assert (lean_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert not replaced(model)
    norms = {type(m).__name__ for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    assert norms <= found, "each norm of a known family is one of two formulas"


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3"])
def test_in_half_precision_too_and_a_quarter_less_is_kept(case):
    model = build(case).requires_grad_(False).eval().bfloat16()
    states, gradient = logits_and_gradient(model)
    plain = kept_bytes(model)
    with lean(model):
        lean_states, lean_gradient = logits_and_gradient(model)
        assert len(replaced(model)) == 2
        assert kept_bytes(model) <= 0.7 * plain
    exact, exact_gradient = logits_and_gradient(build(case).requires_grad_(False).eval())
    for mine, theirs, true in (lean_states, states, exact), (lean_gradient, gradient, exact_gradient):
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm(), "no further off than transformers' own"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [None, MASK])
def test_attention_is_that_of_plain_products(case, mask):
    model = build(case).requires_grad_(False).eval()
    attention = fastest_attention(model, "cpu", torch.bfloat16, 13, 13)
    assert attention == {"sdpa": ATTENTION}.get(model.config._attn_implementation, model.config._attn_implementation)
    assert fastest_attention(model, "cpu", torch.float32, 13, 13) == model.config._attn_implementation
    assert fastest_attention(model, "cpu", torch.bfloat16, 14, 13) == model.config._attn_implementation
    model.set_attn_implementation("eager")
    seen = slice(None) if mask is None else mask.bool()  # what a padded place gives is nobody's business
    states, gradient = logits_and_gradient(model, mask)
    with attending(model, attention):
        lean_states, lean_gradient = logits_and_gradient(model, mask)
    torch.testing.assert_close(lean_states[seen], states[seen], rtol=1e-4, atol=1e-5)
    assert (lean_gradient[seen] - gradient[seen]).norm() <= 1e-5 * gradient[seen].norm()
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    assert capped == (case == "gemma2"), "which has more to its scores, and so is left to transformers"


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3"])
def test_attention_in_half_precision_keeps_less_than_plain_products(case):
    model = build(case).requires_grad_(False).eval().bfloat16()
    ids = torch.arange(128).expand(2, -1)
    kept = {}
    for implementation in ("eager", ATTENTION):
        with attending(model, implementation), lean(model):
            kept[implementation] = kept_bytes(model, ids=ids)
    assert kept[ATTENTION] < 0.7 * kept["eager"]


def test_rows_that_see_nothing_are_finite_in_bfloat16():
    model = build("llama").requires_grad_(False).eval()  # in float32 under autocast: masks have float32's lowest
    with attending(model, ATTENTION), torch.autocast("cpu", torch.bfloat16):
        states, gradient = logits_and_gradient(model, MASK)
    assert states.isfinite().all()
    assert gradient.isfinite().all()


def test_what_learns_and_what_somebody_else_replaced_stays(monkeypatch):
    model = build("llama").requires_grad_(False).eval()
    first, second = model.model.layers[0], model.model.layers[1]
    first.input_layernorm.weight.requires_grad_(True)
    second.mlp.forward = own = lambda x: torch.zeros_like(x)
    with lean(model):
        assert "forward" not in vars(first.input_layernorm)
        assert "forward" in vars(second.input_layernorm)
        assert second.mlp.forward is own
    assert replaced(model) == {"LlamaMLP"}
    assert second.mlp.forward is own


@pytest.mark.parametrize("recipe", saap.RECIPES)
def test_what_a_recipe_prepares_is_lean_too(recipe):
    model = saap.RECIPES[recipe](rank=4).prepare(build("llama"), IDS)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(IDS).logits
        with lean(model):
            assert replaced(model) == {"LlamaRMSNorm", "LlamaMLP"}
            mine = model(IDS).logits
    assert (mine - plain).norm() <= 0.03 * plain.norm()


def test_an_error_leaves_the_model_as_it_was():
    model = build("llama").requires_grad_(False).eval()
    with pytest.raises(ZeroDivisionError), lean(model), attending(model, ATTENTION):
        1 / 0  # noqa: B018
    assert not replaced(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_norm_of_another_formula_stays():
    class ThirdRMSNorm(torch.nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(64), requires_grad=False)

        def forward(self, x):
            return x / (x.norm(dim=-1, keepdim=True) + self.eps) * self.weight

    model = torch.nn.Sequential(ThirdRMSNorm(), torch.nn.RMSNorm(8).requires_grad_(False))  # the second has no eps
    with lean(model):
        assert not replaced(model)


def test_inputs_that_can_be_made_again_are_not_held():
    model, inputs = build("llama").requires_grad_(False).eval(), []
    linears = [
        model.model.layers[1].get_submodule(name) for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    for linear in linears:
        linear.register_forward_hook(lambda module, given, output: inputs.append(weakref.ref(given[0])))
    with watch_gradients(linears, lambda *seen: None), lean(model):
        states = model.get_input_embeddings()(BATCH).detach().requires_grad_()
        model.base_model(inputs_embeds=states, use_cache=False)
        assert [found() for found in inputs] == [None] * 3


def test_the_first_time_draws_no_random_number():
    for known in (_offset, _is_gated):
        known.cache_clear()
    model = build("llama").requires_grad_(False)
    before = torch.get_rng_state()
    with lean(model):
        assert replaced(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_float64_model_is_scored_as_before():
    model = build("llama")
    narrow, wide = (saap.score(one, IDS)[1] for one in (model, copy.deepcopy(model).double()))
    np.testing.assert_allclose(wide, narrow, rtol=1e-3)


def test_outputs_are_made_again_from_what_is_kept():
    model = build("gemma3").requires_grad_(False).eval()
    seen = []

    def see(module, inputs, output):
        if output.requires_grad:
            seen.append((inputs[0].detach().clone(), again(inputs[0])))

    layer = model.model.layers[2]
    for linear in (layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        linear.register_forward_hook(see)
    with lean(model):
        states = model.get_input_embeddings()(BATCH).detach().requires_grad_()
        model.base_model(inputs_embeds=states, use_cache=False)
    assert len(seen) == 3
    for x, make in seen:
        assert torch.equal(make(), x)
