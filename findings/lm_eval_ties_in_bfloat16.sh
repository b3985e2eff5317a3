#!/usr/bin/env bash
# lm-eval scores the answers of a bfloat16 model in bfloat16, so that different answers tie.
# Log-softmax and the sum over an answer's tokens keep the model's dtype unless softmax_dtype says otherwise. A
# log-likelihood of −100 is then a multiple of 0.5, and answers that differ by less are equal; the first one wins. Two
# models that are compared, or one before and after pruning, differ by such ties: two questions of fifty here.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 'lm-eval[hf]==0.4.13' accelerate==1.15.0 tokenizers==0.23.3
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS, QUESTIONS, ANSWERS = 1000, 50, 4
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
config = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     initializer_range=0.05, bos_token_id=1, eos_token_id=1)
model = LlamaForCausalLM(config).bfloat16().eval()


def text(length):
    return " ".join(f"w{i}" for i in torch.randint(2, WORDS, (length,)).tolist())


asked = [(question, " " + text(16)) for question in (text(8) for _ in range(QUESTIONS)) for _ in range(ANSWERS)]
requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in asked]


def scores(**options):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu", **options)
    found = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    return torch.tensor(found, dtype=torch.float64).view(QUESTIONS, ANSWERS)


def ties(found):
    best = found.max(1, keepdim=True).values
    return int(((found == best).sum(1) > 1).sum())


half, full = scores(), scores(softmax_dtype="float32")
changed = int((half.argmax(1) != full.argmax(1)).sum())
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm_eval")))
print(f"expected: no ties for the best of {ANSWERS} different answers, and the same best answer either way")
print(f"seen: log-likelihoods near {full.mean().item():.0f}; distinct values among {half.numel()}: {half.unique().numel()}")
print(f"seen: of {QUESTIONS} questions {ties(half)} tied for the best, {ties(full)} with softmax_dtype=float32")
print(f"seen: best answer another one in {changed}")
assert ties(half) >= 1 and ties(full) == 0 and half.unique().numel() < half.numel() / 2
PY
