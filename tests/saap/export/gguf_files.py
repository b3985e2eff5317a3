"""Models to export, and their GGUF files."""

import pytest
import torch

from saap import SaapError, prune, save
from saap.export.gguf import export_gguf
from tests.saap.models.families import build, random_keep


def pruned(case):
    return prune(build(case), random_keep(build(case)))


def with_output_biases(model):
    """As compensated pruning leaves it: a bias on o_proj and down_proj of every layer."""
    model.config.output_bias = True
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features) / 2)
    return model


def exported(model, tokenizer, folder, **settings):
    save(model, folder, tokenizer)
    return export_gguf(folder, folder / "model.gguf", **settings), folder / "model.gguf"


def refused(model, tokenizer, folder, message, **settings):
    save(model, folder, tokenizer)
    with pytest.raises(SaapError, match=message):
        export_gguf(folder, folder / "model.gguf", **settings)
    assert not list(folder.glob("*.gguf*"))
    assert not list(folder.glob(".*.partial"))
