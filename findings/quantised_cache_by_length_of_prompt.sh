#!/usr/bin/env bash
# A quantised key-value cache takes prompts of some lengths and refuses others.
# Groups of 64 are cut from keys and values as one flat tensor, so 64 must divide KV heads x length x head size. With 32
# heads, or a head size of 64 or 128, it always does. With few heads of another size, which pruning makes of stock models,
# it depends on the prompt: the same model answers one question and raises at the next.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 optimum-quanto==0.2.7 hqq==0.2.8.post1
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def lengths(backend, head_dim, heads):
    """The prompt lengths from 7 to 14 that are answered."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32 * heads, intermediate_size=64, num_hidden_layers=1, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=heads,
    )).eval()
    taken = []
    for length in range(7, 15):
        try:
            model.generate(
                torch.arange(3, 3 + length)[None], max_new_tokens=2, do_sample=False, pad_token_id=0,
                cache_implementation="quantized", cache_config={"backend": backend, "nbits": 4},
            )
            taken.append(length)
        except (ValueError, AssertionError):
            pass
    return taken


names = ("torch", "transformers", "optimum-quanto", "hqq")
print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
print("expected: prompts of every length")
every, even, fourth = [*range(7, 15)], [8, 10, 12, 14], [8, 12]
for backend in ("quanto", "hqq"):
    seen = {(size, heads): lengths(backend, size, heads) for size, heads in ((96, 8), (96, 3), (80, 2), (80, 1))}
    for (size, heads), taken in seen.items():
        print(f"seen: {backend}, {heads} KV heads of {size}: of the lengths 7 to 14 it takes {taken}")
    assert [*seen.values()] == [every, even, even, fourth]
PY
