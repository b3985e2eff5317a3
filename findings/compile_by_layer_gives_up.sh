#!/usr/bin/env bash
# Compiling a language model layer by layer compiles eight layers and leaves the others uncompiled.
# All layers are alike, so one compilation is what "regional compilation" promises, and without a cache one it is. With
# a key-value cache, which generation always has, the number of the layer is a constant of its graph: every layer is
# compiled anew, and after torch's limit of 8 the rest runs as plain Python. Layers pruned to their own widths, the
# other way round, share fewer graphs without a cache, and with one nothing gets worse for them.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 accelerate==1.15.0
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import logging
from importlib.metadata import version

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
LAYERS = 12
tokens = torch.arange(3, 11)[None]


def compiled(by_layer, use_cache):
    """How many graphs were made, and whether torch gave up on a layer."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4
    )).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if by_layer:
        for layer in model.model.layers:
            layer.compile(backend=backend)
    else:
        model.compile(backend=backend)
    with torch.no_grad():
        model(tokens, use_cache=use_cache)
    return len(graphs), any("recompile limit" in why for why in counters["unimplemented"])


seen = {
    "whole model, cache": compiled(False, True),
    "by layer, no cache": compiled(True, False),
    "by layer, cache": compiled(True, True),
}
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
print(f"expected: one graph for {LAYERS} equal layers, with a cache as without")
for case, (graphs, gave_up) in seen.items():
    print(f"seen: {case}: {graphs} graph(s); some layers left uncompiled: {gave_up}")
assert list(seen.values()) == [(1, False), (1, False), (8, True)]
PY
