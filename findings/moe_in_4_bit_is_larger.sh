#!/usr/bin/env bash
# A mixture-of-experts model loaded in 4 bit for QLoRA takes more memory than it did in bfloat16.
# transformers 5 keeps the experts of a layer in one 3-D parameter. bitsandbytes replaces nn.Linear only, so the experts,
# which are nearly all of the model, stay as they are, without a word; prepare_model_for_kbit_training then turns what is
# not quantised into float32: twice the bytes. all-linear does put adapters on the experts, and on the router too.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 bitsandbytes==0.50.2 peft==0.21.2 accelerate==1.15.0
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

warnings.simplefilter("always")
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    moe_intermediate_size=64, num_experts=32, num_experts_per_tok=2,
)
AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained("model")


def mib(model):
    return round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, 2)


plain = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
with warnings.catch_warnings(record=True) as said:
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16, quantization_config=four_bit)
warned = any("expert" in str(w.message).lower() for w in said)
loaded, dtypes = mib(model), {str(p.dtype) for name, p in model.named_parameters() if "experts" in name}
prepared = mib(prepare_model_for_kbit_training(model))
adapted = {
    name.split("layers.0.")[1].split(".lora")[0].replace(".base_layer", "")
    for name, p in get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)).named_parameters()
    if p.requires_grad and "layers.0.mlp" in name
}
names = ("torch", "transformers", "bitsandbytes", "peft")
print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
print("expected: about a quarter of the bytes in 4 bit, and a warning about what stays")
print(f"seen: MiB in bfloat16 {mib(plain)}, loaded in 4 bit {loaded}, prepared for training {prepared}")
print(f"seen: the experts are {dtypes}; warned of it: {warned}; adapters in the MLP: {sorted(adapted)}")
assert loaded > 0.9 * mib(plain) and prepared > 1.7 * mib(plain) and not warned
assert dtypes == {"torch.bfloat16"} and adapted == {"mlp.experts", "mlp.gate"}
PY
