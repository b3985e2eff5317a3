#!/usr/bin/env bash
# The logits of the last place cost a copy of the head for every row of the batch, where the head is frozen.
# Hidden states of the last place (`logits_to_keep=1`) do not lie one behind the other. torch multiplies such rows one by
# one, unless the weight asks for a gradient, and on a CPU in bfloat16 each gets a copy of the weight, all at once. So
# `requires_grad_(False)`, meant to save memory, takes gigabytes. See pytorch issue 186148.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0
cat > one.py <<'PY'
import resource
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(vocab_size=65536, **sizes)).bfloat16().eval()
model.requires_grad_(sys.argv[1] == "asks")
prompts = torch.arange(32).repeat(16, 1)
with torch.no_grad():
    model.model(prompts)  # all but the head, so that what is made once is not counted
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model(prompts, logits_to_keep=1)
seconds = time.perf_counter() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
PY
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import subprocess
import sys
from importlib.metadata import version

seen = {}
for weights in ("asks", "frozen"):
    done = subprocess.run([sys.executable, "one.py", weights], capture_output=True, text=True, check=True)
    seen[weights] = [float(number) for number in done.stdout.split()[-2:]]
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
print("expected: a frozen model takes no more than one whose weights ask for gradients; its head has 64 MB")
for weights, (seconds, megabytes) in seen.items():
    print(f"seen: 16 prompts, weights {weights}: {seconds:.2f} s, {megabytes:.0f} MB more at the peak")
assert seen["frozen"][1] > 8 * 64 > seen["asks"][1]
assert seen["frozen"][0] > 3 * seen["asks"][0]
PY
