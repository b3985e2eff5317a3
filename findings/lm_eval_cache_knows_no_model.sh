#!/usr/bin/env bash
# lm-eval's cache of answers does not know which model gave them: a second model gets the scores of the first.
# The key is a digest of the request alone, and the file is the one that use_cache (--use_cache) names. So a pruned model that is
# measured with the dense model's cache has the dense model's accuracy, and nothing says so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 datasets==5.2.0 'lm-eval[hf]==0.4.13'
export HF_HOME="$folder/hub" HF_HUB_OFFLINE=1
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import json
import random
from importlib.metadata import version

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = [f"w{number}" for number in range(60)]
ids = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
whole = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
whole.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")

draw = random.Random(0)
with open("questions.jsonl", "w") as file:
    for _ in range(40):
        question, *answers = (" ".join(draw.choices(words, k=length)) for length in (6, 2, 2))
        file.write(json.dumps({"question": question, "answers": answers, "right": draw.randrange(2)}) + "\n")
task = {"task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}, "test_split": "test"}
task |= {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{answers}}", "doc_to_target": "{{right}}"}


def accuracy(seed, cache=None):
    """Of random weights, on 40 questions."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(ids), initializer_range=0.5, **sizes)).eval()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    return lm_eval.simple_evaluate(lm, tasks=[dict(task)], use_cache=cache, bootstrap_iters=0)["results"]["questions"]["acc,none"]


alone = [accuracy(seed) for seed in (0, 1, 2)]
cached = [accuracy(seed, "answers") for seed in (0, 1, 2)]
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("lm-eval", "torch", "transformers")))
print(f"expected: three models, three accuracies, with or without a cache: {alone}")
print(f"seen: with one cache for the three: {cached}")
assert len(set(alone)) == 3, alone
assert cached == [alone[0]] * 3, cached
PY
