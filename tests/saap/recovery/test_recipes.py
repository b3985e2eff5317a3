"""Each recipe: what comes out is plain, computes what was trained, and only what should learn learns."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from saap import RECIPES, Groupwise, GroupwiseLinear, Lora, Qlora, SaapError, Training, load, prune, recover, save
from saap.recovery.loss import Student
from saap.recovery.nf4 import from_nf4, to_nf4
from tests.saap.models.families import build, random_keep
from tests.saap.models.mixtures import build as mixture

IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(4))
NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SHORT = Training(epochs=1, batch_size=4, micro_batch_size=4, learning_rate=1e-2, warmup_steps=0, save_steps=50,
                 max_length=64, loss_on="text", precision="float32", held_out=0.0)  # fmt: skip


@pytest.fixture(params=["groupwise", "lora", "qlora"])
def recipe(request):
    return RECIPES[request.param](rank=4, alpha=8.0)


def learn(model):
    """Stand-in for training: every parameter that learns gets a value of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)


def test_the_finished_model_is_plain_and_computes_what_the_trained_one_did(recipe, tiny_llama, tmp_path):
    source = tiny_llama(attention_bias=True)
    untouched = source.state_dict()["model.embed_tokens.weight"].clone()
    model = recipe.prepare(source, IDS)
    learn(model)
    model.eval()  # measuring the held-out loss must not change what is merged
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        trained = model(IDS).logits
        finished = recipe.finish(model)
        bound = 2e-2 if recipe == Groupwise(rank=4, alpha=8.0) else 1e-4  # float16 zeros
        assert (finished(IDS).logits - trained).abs().max() < bound
        kinds = {type(m) for m in finished.modules() if hasattr(m, "in_features")}
        assert kinds == ({nn.Linear, GroupwiseLinear} if isinstance(recipe, Groupwise) else {nn.Linear})
        assert not finished.training
        assert torch.equal(finished.state_dict()["model.embed_tokens.weight"], untouched)
        save(finished, tmp_path)
        assert torch.equal(load(tmp_path)(IDS).logits, finished(IDS).logits)


@pytest.mark.parametrize("case", ["gemma2", "phi3", "glm4", "olmo2", "granite", "qwen3_5", "cohere2"])
def test_adapters_merge_exactly_in_every_layout(case):
    recipe = Groupwise(rank=4, alpha=8.0, group_size=16)
    model = build(case)
    small = prune(model, random_keep(model))
    trained = recipe.prepare(small, IDS)
    learn(trained)
    ids = IDS.clamp(min=3)
    loss = Student(trained, None, 0.0)(ids, torch.ones_like(ids), ids)["loss"]
    learning = [p for p in trained.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in torch.autograd.grad(loss, learning))
    with torch.no_grad():
        before = trained.eval()(ids).logits
        after = recipe.finish(trained)(ids).logits
    assert (after - before).abs().max() < 4e-2 * before.abs().max()  # float16 zeros, and gates of linear attention


def test_lora_recovers_the_attention_of_a_mixture_of_experts():
    model, recipe = mixture("mixtral"), Lora(rank=4, alpha=8.0)
    trained = recipe.prepare(model, IDS)
    learn(trained)
    with torch.no_grad():
        before = trained.eval()(IDS).logits
        after = recipe.finish(trained)(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_untrained_adapters_leave_lora_as_it_was_and_qlora_as_nf4_is(tiny_llama):
    model = tiny_llama()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    same = Lora(rank=4).finish(Lora(rank=4).prepare(copy.deepcopy(model), IDS)).state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in expected.items())
    four = Qlora(rank=4).finish(Qlora(rank=4).prepare(model, IDS)).state_dict()
    for name, weight in expected.items():
        if name.split(".")[-2] not in NAMES:
            assert torch.equal(four[name], weight)
            continue
        # four bits of a normal weight: with 16 levels at its quantiles, about a tenth of its norm is lost
        assert 0.05 < (four[name] - weight).norm() / weight.norm() < 0.12


@pytest.mark.parametrize("width", [64, 72, 80, 81, 96, 100, 112, 128, 176, 240])
def test_nf4_rows_of_any_length_are_read_right_forward_and_back(width):
    torch.manual_seed(0)
    linear = nn.Linear(width, 48)
    four = to_nf4(linear)
    weight = from_nf4(four)
    assert 0.05 < (weight - linear.weight).norm() / linear.weight.norm() < 0.12
    x = torch.randn(5, width, requires_grad=True)
    (found,) = torch.autograd.grad((y := four(x)).square().sum(), x)
    plain = torch.nn.functional.linear(x, weight, linear.bias)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_targets_learn(name, tiny_llama):
    recipe = RECIPES[name](rank=4, targets=("q_proj", "down_proj"))
    model = recipe.prepare(tiny_llama(), IDS)
    learned = [path for path, p in model.named_parameters() if p.requires_grad]
    assert {part for path in learned for part in path.split(".") if part in NAMES} == {"q_proj", "down_proj"}
    assert len(learned) == 2 * 2 * 6
    learn(model)
    with torch.no_grad():
        trained = model(IDS).logits
        assert (recipe.finish(model)(IDS).logits - trained).abs().max() < 2e-2


def test_a_family_without_an_int4_form_has_lora_and_says_so_of_groupwise():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
    model = Lora(rank=4, targets=("query_key_value",)).prepare(BloomForCausalLM(config).eval(), IDS)
    learn(model)
    with torch.no_grad():
        trained = model(IDS).logits
        assert (Lora(rank=4).finish(model)(IDS).logits - trained).abs().max() < 1e-4
    with pytest.raises(SaapError, match="bloom"):
        Groupwise().prepare(BloomForCausalLM(config), IDS)


@pytest.mark.parametrize("name", RECIPES)
def test_gradient_checkpointing_changes_no_gradient(name, tiny_llama):
    model = RECIPES[name](rank=4).prepare(tiny_llama(), IDS)
    learn(model)
    student, grads = Student(model).train(), []
    labels = IDS.clone()
    labels[:, 0] = -100
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        student(IDS, torch.ones_like(IDS), labels)["loss"].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(g.abs().sum() > 0 for g in grads[0])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_lora_and_qlora_learn_through_the_same_training(name, tiny_folder, tiny_tokenizer, mini, tmp_path):
    rows = [row for row in mini("alpaca/train") if len(row["output"]) < 120][:16]
    model, steps = recover(load(tiny_folder), rows, tiny_tokenizer, tmp_path, RECIPES[name](rank=4), SHORT)
    assert len(steps) == 4
    assert steps[-1].loss < steps[0].loss
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {nn.Linear}


def test_a_model_in_half_precision_is_trained_in_float32_and_comes_back_as_it_came(
    recipe, tiny_folder, tiny_tokenizer, mini, tmp_path
):
    rows = [row for row in mini("alpaca/train") if len(row["output"]) < 120][:8]
    training = replace(SHORT, distill=0.5)
    half, teacher, wide, wide_teacher = (load(tiny_folder, dtype="bfloat16") for _ in range(4))
    model, steps = recover(half, rows, tiny_tokenizer, tmp_path / "half", recipe, training, teacher)
    wide_teacher.float()
    _, expected = recover(wide.float(), rows, tiny_tokenizer, tmp_path / "wide", recipe, training, wide_teacher)
    assert steps[0].loss == pytest.approx(expected[0].loss, rel=1e-6)  # later ones: LoRA's first values are rounded
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if name.endswith("zero")} <= {torch.float16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("query", "q_proj")}, "query.*may name.*down_proj.*v_proj"),
        ({"rank": 0}, "rank"),
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"group_size": 1}, "group_size"),
        ({"groups": 0}, "groups"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tiny_llama, options, message):
    with pytest.raises(SaapError, match=message):
        Groupwise(**options).prepare(tiny_llama(), IDS)


def test_the_float_weights_are_gone_once_they_are_quantised(tiny_llama):
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    Groupwise(rank=4).prepare(model, IDS)
    assert sum(p.numel() for p in model.parameters()) < before / 2
