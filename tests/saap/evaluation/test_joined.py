"""Kernels joined by torch.compile: results stay, and so do the classes. Inductor itself needs a compiler."""

import pytest
import torch
from transformers import StaticCache

from saap import prune, to_groupwise
from saap.evaluation.joined import joined_kernels
from tests.saap.models.families import build, random_keep


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("form", ["dense", "pruned", "int4"])
def test_a_step_gives_the_same(case, form):
    torch._dynamo.reset()
    model = build(case)
    if form != "dense":
        model = prune(model, random_keep(model))
    if form == "int4":
        model = to_groupwise(model, 16)
    ids = torch.arange(3, 11)[None]

    def step():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=cache, use_cache=True)
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits

    with torch.inference_mode():
        before = step()
        torch._dynamo.utils.counters.clear()
        with joined_kernels(model, "aot_eager"):
            inside = step()
        after = step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # norms and the MLP, or rotary embeddings
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, before)
