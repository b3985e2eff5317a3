"""The divergence of a pruned model from the dense one, against torch's kl_div on whole logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saap import discover, prune, select
from saap.scoring import divergence as module
from saap.scoring.divergence import divergence
from tests.saap.models.families import build


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2"])  # plain, capped, and scaled logits
def test_it_is_torchs_kl_div_of_the_logits_for_each_sequence(family, tiny_llama, monkeypatch):
    model = tiny_llama() if family == "llama" else build(family)
    groups = discover(model)
    small = prune(model, select(np.random.default_rng(0).random(len(groups)), groups, 0.2, protect=(), align=8))
    tokens = torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, own = (each(tokens).logits.double().log_softmax(-1) for each in (model, small))
    wanted = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1).mean(1).numpy()
    monkeypatch.setattr(module, "LOGITS", 7 * 512)  # seven tokens at a time
    for batch_size in (2, 5):
        np.testing.assert_allclose(divergence(model, small, tokens, batch_size=batch_size), wanted, rtol=1e-3)
    assert wanted.min() > 1e-4
    assert np.abs(divergence(model, model, tokens)).max() < 1e-6
