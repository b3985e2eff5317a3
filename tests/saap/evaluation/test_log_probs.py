from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from saap.evaluation import log_probs as module
from saap.evaluation.log_probs import log_probs


def causal(head):
    """What `log_probs` needs of a model."""
    config = SimpleNamespace(model_type="llama")
    return SimpleNamespace(config=config, get_output_embeddings=lambda: head)


@pytest.mark.parametrize("at_once", [1, 700, 1 << 20])
@pytest.mark.parametrize("bias", [True, False])
def test_pieces_of_the_vocabulary_give_the_log_softmax_of_all_of_it(monkeypatch, at_once, bias):
    monkeypatch.setitem(module.LOGITS, "cpu", at_once)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias).requires_grad_(False)
    hidden = 20 * torch.randn(7, 16)
    rows, tokens = torch.randint(0, 7, (40,)), torch.randint(0, 300, (40,))
    logits = head.double()(hidden.double())
    head.float()
    tokens[:7], rows[:7] = logits.argmax(-1), torch.arange(7)
    found, likeliest = log_probs(causal(head), hidden, rows, tokens)
    torch.testing.assert_close(found.double(), logits.log_softmax(-1)[rows, tokens], rtol=1e-5, atol=1e-5)
    assert torch.equal(likeliest, logits.argmax(-1)[rows] == tokens)
    assert 7 <= likeliest.sum() < 40


def test_of_equal_logits_the_first_is_the_likeliest(monkeypatch):
    monkeypatch.setitem(module.LOGITS, "cpu", 2)
    head = torch.nn.Linear(1, 6, False).requires_grad_(False)
    head.weight[:, 0] = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, 2.0])
    _, likeliest = log_probs(causal(head), torch.ones(1, 1), torch.zeros(6, dtype=torch.long), torch.arange(6))
    assert likeliest.tolist() == [False, True, False, False, False, False]


def test_many_tokens_do_not_add_up_to_a_bias():
    """torch's own float32 log_softmax is 3e-6 off on the average here, and 8e-6 on SmolLM2's logits."""
    torch.manual_seed(1)
    head = torch.nn.Linear(32, 49152, False).requires_grad_(False)
    hidden, tokens = 10 * torch.randn(200, 32), torch.randint(0, 49152, (200,))
    found, _ = log_probs(causal(head), hidden, torch.arange(200), tokens)
    exact = (hidden.double() @ head.weight.double().T).log_softmax(-1)[torch.arange(200), tokens]
    assert abs((found.double() - exact).mean()) < 1e-6


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OTHER_LOGITS = {
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0)
    ),
    "scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, num_key_value_heads=1, logits_scaling=0.2)),
}


@pytest.mark.parametrize("logits", OTHER_LOGITS)
def test_logits_are_scaled_and_capped_as_the_model_has_them(logits):
    torch.manual_seed(2)
    model = OTHER_LOGITS[logits]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        ids = torch.randint(0, 300, (1, 9))
        expected = model(ids).logits[0].log_softmax(-1)
        hidden = model.base_model(ids).last_hidden_state[0]
    rows, tokens = torch.arange(9).repeat(4), torch.randint(0, 300, (36,))
    found, _ = log_probs(model, hidden, rows, tokens)
    torch.testing.assert_close(found, expected[rows, tokens], rtol=1e-4, atol=1e-4)
