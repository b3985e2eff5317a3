#!/usr/bin/env bash
# A checkpoint whose config says "tied" and whose file holds another head is loaded with both readings in turn.
# transformers keeps the head of the file and does not tie. Whatever later calls tie_weights(), as resizing the embeddings
# or preparing a device map does, replaces the trained head by the embeddings: same shapes, another model, no message.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                     tie_word_embeddings=False)
LlamaForCausalLM(config).save_pretrained("model")
file = Path("model/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))

model = AutoModelForCausalLM.from_pretrained("model")
tokens = torch.arange(8)[None]
with torch.no_grad():
    loaded = model(tokens).logits
    tied = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.resize_token_embeddings(64)  # the size it has already
    after_resize = torch.equal(model(tokens).logits, loaded)
    model.tie_weights()
    after_tie = torch.equal(model(tokens).logits, loaded)
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
print("expected: tied, as the config says, or an error; and the same logits throughout")
print(f"seen: tied after loading: {tied}; same logits after a resize to the same size: {after_resize}, "
      f"after tie_weights(): {after_tie}")
assert not tied and not after_tie
PY
