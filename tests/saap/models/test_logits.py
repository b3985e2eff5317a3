import pytest
import torch

from saap.models import logits
from saap.models.logits import cross_entropy


@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["unsure", "sure"])
@pytest.mark.parametrize("at_once", [1, 60, 10**6])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 5.0)])
def test_the_loss_and_its_gradient_are_those_of_autograd_in_any_pieces_of_the_vocabulary(
    monkeypatch, spread, at_once, scale, cap
):
    monkeypatch.setitem(logits.LOGITS, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 33, dtype=torch.float64)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64).mul_(spread).requires_grad_()
    targets = torch.tensor([0, 32, 7, 7, 19, int(head(hidden)[5].argmax())])
    plain = scale * head(hidden)
    losses = torch.nn.functional.cross_entropy(cap * (plain / cap).tanh() if cap else plain, targets, reduction="none")
    (expected,) = torch.autograd.grad(0.5 * losses.sum(), hidden)
    head.float()
    value, found = cross_entropy(head.weight, head.bias, hidden.detach().float(), targets, scale, cap, factor=0.5)
    torch.testing.assert_close(value.double(), losses.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    if cap is None:
        one = found[5].double()  # a confident answer: its gradient is nearly zero and must still be exact
        assert (one - expected[5]).norm() < 1e-3 * expected[5].norm()
