#!/usr/bin/env bash
# transformers reads a llama GGUF without its rotary scaling and without its q, k, v biases.
# Both are in the file and llama.cpp uses them. The model that comes out runs, on short texts hardly worse, and is
# another one: a long-context Llama pruned, trained or measured from its GGUF is not the model of that name.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
from importlib.metadata import version

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

HIDDEN, HEADS, MLP, WORDS = 64, 4, 128, 32
random = np.random.default_rng(0)
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(8192)
writer.add_embedding_length(HIDDEN)
writer.add_feed_forward_length(MLP)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_rope_dimension_count(HIDDEN // HEADS)
writer.add_rope_freq_base(10000.0)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(8.0)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(WORDS)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"w{i}" for i in range(WORDS)])
writer.add_token_scores([0.0] * WORDS)
writer.add_token_types([1] * WORDS)
shapes = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN), "blk.0.ffn_gate": (MLP, HIDDEN),
          "blk.0.ffn_up": (MLP, HIDDEN), "blk.0.ffn_down": (HIDDEN, MLP)}
shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
for name in "qkv":
    writer.add_tensor(f"blk.0.attn_{name}.bias", np.ones(HIDDEN, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model, info = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", output_loading_info=True)
rope = dict(model.config.rope_parameters)
biases = sorted(name for name in model.state_dict() if name.endswith("bias"))
silent = not info["unexpected_keys"] and not info["missing_keys"]
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("transformers", "gguf")))
print("expected: linear rotary scaling by 8, biases of q, k and v, or an error")
print(f"seen: rotary settings {rope}, biases {biases}, nothing about it in the loading report: {silent}")
assert rope["rope_type"] == "default" and not biases and silent
PY
