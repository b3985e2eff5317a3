import pytest
import torch
from torch.nn import functional as F

from saap.models import logits
from saap.recovery import loss
from saap.recovery.loss import Student
from tests.saap.models.families import build

GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(0, 512, (3, 11), generator=GENERATOR)
LABELS = torch.where(torch.rand(IDS.shape, generator=GENERATOR) < 0.4, -100, IDS)
LABELS[:, 0] = -100
MASK = torch.ones_like(IDS)
MASK[1, 8:] = 0
LABELS[1, 8:] = -100


def plain(model, teacher, share):
    """The same from whole logits, by autograd: cross-entropy and KL(teacher ‖ model), means over the labels."""
    logp = model(IDS, attention_mask=MASK).logits[:, :-1].log_softmax(-1)
    chosen = LABELS[:, 1:] != -100
    value = F.nll_loss(logp[chosen], LABELS[:, 1:][chosen])
    if teacher is None:
        return value
    with torch.no_grad():
        q = teacher(IDS, attention_mask=MASK).logits[:, :-1].softmax(-1)
    return (1 - share) * value + share * F.kl_div(logp[chosen], q[chosen], reduction="batchmean")


@pytest.mark.parametrize("share", [None, 0.3, 1.0])
@pytest.mark.parametrize("logits_at_once", [512 * 4, 2**24], ids=["pieces", "whole"])
def test_the_loss_and_its_gradients_equal_autograd_through_whole_logits(tiny_llama, monkeypatch, share, logits_at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setitem(logits.LOGITS, "cpu", logits_at_once)
    model = tiny_llama(tie_word_embeddings=False).train()
    teacher = None if share is None else tiny_llama(seed=9, hidden_size=32)
    model.lm_head.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    found = Student(model, teacher, share or 0.0)(IDS, MASK, LABELS)["loss"]
    expected = plain(model, teacher, share)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, autograd in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(mine, autograd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["gemma2", "granite", "cohere2"])
def test_logits_that_are_scaled_or_capped_are_those_of_the_model(case):
    model, teacher = build(case).train(), build(case)
    model.requires_grad_(False)
    learned = [layer.mlp.down_proj.weight.requires_grad_() for layer in model.model.layers]
    found = Student(model, teacher, 0.3)(IDS, MASK, LABELS)["loss"]
    expected = plain(model, teacher, 0.3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, autograd in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(mine, autograd, rtol=1e-4, atol=1e-6)


def test_the_sum_is_over_the_labels_of_the_whole_step_and_without_the_teacher_when_measured(tiny_llama):
    model, teacher = tiny_llama(), tiny_llama(seed=9)
    count = int((LABELS != -100).sum())
    with torch.no_grad():
        student = Student(model, teacher, 0.5)
        assert not [name for name, _ in student.named_parameters() if "teacher" in name]
        student.eval()
        whole = student(IDS, MASK, LABELS, num_items_in_batch=2 * count)["loss"]
        assert float(whole) == pytest.approx(float(plain(model, None, 0.0)) / 2, rel=1e-5)
